"""Rotten Tomatoes accuracy of quantized classifiers, against the same model fine-tuned in fp32, for several seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks import peers, tuned
from benchmarks.command import made
from benchmarks.models import MINILM, Model, sentences
from benchmarks.quantization.variants import CLASSES, THREE, TRAINED, Variant, arguments
from benchmarks.runner import Job, Result, Row
from benchmarks.tuned import SEEDS, TASK, data
from flyweight import artifact
from flyweight.artifact import Measurement
from flyweight.data import Examples
from flyweight.engines import onnxruntime
from flyweight.engines.engine import Predictor, engine_named
from flyweight.measure.size import disk
from flyweight.settings import DataSettings
from flyweight.splits import read_unlabelled
from flyweight.tokenization import open_encoder

STACK = ("bytes.attention", "bytes.mlp")


def row_name(model: Model, key: str, seed: int) -> str:
    return f"{model.key}-class-{key}-s{seed}"


def reference(job: Job, model: Model) -> Path:
    return tuned.folder(model, job.seed)


def make_reference(model: Model) -> Callable[[Job], Result]:
    """A fine-tuned model: an artifact with torch weights and an fp32 ONNX file."""
    return lambda job: tuned.make(job, model)


def judged(job: Job, model: Model, predictor: Predictor, size: Measurement) -> Result:
    return tuned.judge(job, reference(job, model), predictor, size)


def run_variant(model: Model, variant: Variant) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        files = {"--calibrate": sentences(job).calibration}
        if "train" in variant.flags.split():
            files = {"--train": data(job)["train"]}
        flags = arguments(variant, job.trial)
        done = made(job, "quantize", reference(job, model), flags, files, f"{model.title}-tuned")
        out = job.work / "artifact"
        predictor = engine_named("onnxruntime").open(out, threads=1)
        found = judged(job, model, predictor, disk(out, "onnxruntime")["bytes"])
        figures = {**found.figures, **done.figures(out), "stack.ratio": stack_ratio(out, reference(job, model))}
        return found._replace(figures=figures, runs=[done.command])

    return run


def stack_ratio(folder: Path, whole: Path) -> Measurement:
    """How many times fewer bytes the blocks' linears take in model.safetensors than in fp32."""

    def stored(path: Path) -> float:
        figures = artifact.read_manifest(path).measurements["result"]
        return sum(figures[key].value for key in STACK)

    how = "bytes of attention and MLP (weights, scales, biases) in model.safetensors: fp32 / packed"
    return Measurement(value=stored(whole) / stored(folder), unit="x", method=how)


Peer = Callable[[Path, Path, Examples, int], None]


def run_peer(model: Model, name: str, make: Peer, opened: Callable[[Path, int], Predictor]) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        folder, target = reference(job, model), job.work / name
        manifest = artifact.read_manifest(folder)
        if not target.is_file():
            encoder = open_encoder(folder, manifest.pad_token_id, manifest.max_length)
            texts = read_unlabelled(sentences(job).calibration, DataSettings(), TASK, encoder)
            make(folder / manifest.engines["onnxruntime"].file, target, texts, manifest.pad_token_id)
        files = [path for path in (target, target.with_suffix(".bin")) if path.is_file()]
        return judged(job, model, opened(target, 1), peers.bytes_of(files, folder))

    return run


def variants(model: Model) -> tuple[Variant, ...]:
    """MPNet's 3-bit ladder is judged by accuracy too; its training is left to MiniLM."""
    return (*CLASSES, *TRAINED) if model is MINILM else (*CLASSES, *(v for v in THREE if v.key != "3bit-hqq"))


def rows(model: Model) -> tuple[Row, ...]:
    """For each seed: the reference, two peers, ours. On request: MPNet's, and trainings of all but the first seed."""
    small, found = model is MINILM, []
    long = {variant.key for variant in TRAINED}

    def add(key: str, summary: str, minutes: float, run: Callable[[Job], Result], seed: int) -> None:
        needs = () if key == "fp32" else (row_name(model, "fp32", seed),)
        name = row_name(model, key, seed)
        asked = not small or (key in long and seed != SEEDS[0])
        found.append(Row(name, f"{summary}, seed {seed}", minutes, run, None, needs, asked, seed))

    for seed in SEEDS:
        add("fp32", "fine-tuned, torch fp32", 9 if small else 22, make_reference(model), seed)
        for key, (summary, make, opened, name) in PEERS.items():
            add(key, summary, 1.5 if small else 5, run_peer(model, name, make, opened), seed)
        for variant in variants(model):
            summary = f"**Flyweight**, {variant.summary}"
            add(variant.key, summary, variant.minutes[not small], run_variant(model, variant), seed)
    return tuple(found)


def _dynamic(source: Path, target: Path, texts: Examples, pad: int) -> None:
    peers.onnxruntime_int8(source, target)


PEERS = {
    "onnxruntime-int8": ("onnxruntime's dynamic int8", _dynamic, onnxruntime.open_file, "model.onnx"),
    "openvino-nncf": ("OpenVINO + NNCF int8", peers.nncf_int8, peers.open_openvino, "model.xml"),
}
