"""Classifiers fine-tuned on Rotten Tomatoes, the references that tables share: one a model and seed; and how they are judged."""

from __future__ import annotations

from pathlib import Path

from benchmarks import runner
from benchmarks.command import own_cache
from benchmarks.models import MINILM, MPNET, Model
from benchmarks.quality import accuracy
from benchmarks.runner import Job, Result
from flyweight import api, artifact
from flyweight.artifact import Measurement
from flyweight.engines.engine import Predictor, engine_named
from flyweight.measure.quality import answers
from flyweight.measure.size import disk
from flyweight.settings import DataSettings, FinetuneSettings, MeasureSettings
from flyweight.splits import read_labelled
from flyweight.tasks import task_named
from flyweight.tokenization import open_encoder

TASK = task_named("text-classification")
SEEDS = (0, 1, 2)
TUNING = {
    MINILM.key: FinetuneSettings(epochs=3, learning_rate=5e-5),
    MPNET.key: FinetuneSettings(epochs=1, learning_rate=3e-5),  # one epoch is 17 minutes on 2 cores
}
QUICK = MeasureSettings(rounds=3, batches=(1,), lengths=(32,), leave_out=("memory", "energy"))


def folder(model: Model, seed: int) -> Path:
    """Where it is, or will be: below the work of the table that had it first."""
    return runner.WORK / "quantization" / f"{model.key}-class-fp32-s{seed}" / "artifact"


def make(job: Job, model: Model) -> Result:
    """An artifact with torch weights and an fp32 ONNX file, made unless another table has; judged in torch."""
    out = folder(model, job.seed)
    if not artifact.is_artifact(out):
        settings = TUNING[model.key].model_copy(update={"max_steps": 4} if job.trial else {})
        own_cache(out.parent)
        given = {"task": TASK.name, "seed": job.seed, "measure": QUICK, "train": data(job)["train"]}
        api.run_step("finetune", str(model.folder()), settings, out=out, **given)
    return judge(job, out, engine_named("torch").open(out), disk(out, "torch")["bytes"])


def data(job: Job) -> dict[str, Path]:
    """train and eval of the labelled split; a trial takes some rows of each."""
    files = job.data
    if not job.trial:
        return {"train": files.train, "eval": files.eval}
    short = {}
    for name, path, size in (("train", files.train, 120), ("eval", files.eval, 40)):
        short[name] = runner.WORK / job.table / f"{name}.jsonl"
        lines = path.read_text("utf-8").splitlines(keepends=True)
        lines = lines[:: len(lines) // size]  # they stand in order of their hash, which decides what is for validation
        short[name].parent.mkdir(parents=True, exist_ok=True)
        short[name].write_text("".join(lines), encoding="utf-8")
    return short


def judge(job: Job, source: Path, predictor: Predictor, size: Measurement) -> Result:
    """Accuracy on the held-out examples one by one, read by the tokenizer of the artifact `source`; and bytes."""
    manifest = artifact.read_manifest(source)
    encoder = open_encoder(source, manifest.pad_token_id, manifest.max_length)
    held_out = read_labelled(data(job)["eval"], DataSettings(), TASK, encoder, manifest.labels)
    right = TASK.scores(answers(predictor, held_out, manifest.pad_token_id, batch_size=1), held_out)
    predictor.close()
    return Result({**accuracy(right), "bytes": size}, right.tolist())
