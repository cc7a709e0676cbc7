"""Run a recipe: every finished prefix is kept by content hash, so a changed or interrupted run repeats nothing.

The *reference* is the model after the leading `finetune` steps; its cache entry holds torch weights and an fp32 engine file.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyweight import artifact
from flyweight.artifact import Manifest, StepRecord
from flyweight.checks import open_other
from flyweight.context import Context
from flyweight.data import Columns
from flyweight.engines import onnxruntime
from flyweight.errors import StepError
from flyweight.golden import TEXTS
from flyweight.job import Job
from flyweight.measure.memory import OwnPeak
from flyweight.measure.size import part_bytes, weights
from flyweight.measure.static import static_figures
from flyweight.models.activations import simulate
from flyweight.models.bundle import Bundle
from flyweight.models.finite import check_finite
from flyweight.models.storage import restore, save
from flyweight.parity import check
from flyweight.settings import TeacherSettings
from flyweight.steps import step_named
from flyweight.training import predict

__all__ = ["add_engine", "reopen", "run_steps", "share_engines"]


def run_steps(job: Job) -> Bundle:
    """Run what is not cached yet; afterwards the reference's cache entry exists. Returns the final model."""
    steps, leading = job.recipe.steps, job.leading
    done = whole(job)
    bundle = reopen(job, done) if done else job.bundle
    if done == 0 and leading == 0 and not job.cached(0):
        keep(job, 0, bundle)
    for number, step in enumerate(steps):
        label = f"[{number + 1}/{len(steps)}] {step.name}"
        if number < done:
            job.progress.note(f"{label}: done before, taken from the cache")
            continue
        job.progress.note(label)
        bundle = run_step(job, number, bundle)
    job.cache.trim(keep=frozenset(job.keys))
    return bundle


def whole(job: Job) -> int:
    """`job.done`, once what would be read has been verified; a damaged entry is removed and made again."""
    while True:
        done = job.done
        damaged = [i for i in {done, job.leading} if job.cached(i) and not job.cache.whole(job.keys[i])]
        if not damaged:
            return done
        for number in damaged:
            job.progress.note(f"the model after {number} steps is damaged in the cache: making it again")
            job.cache.drop(job.keys[number])


def run_step(job: Job, number: int, bundle: Bundle) -> Bundle:
    """One step, its record and its cache entry."""
    step = job.recipe.steps[number]
    work = job.cache.work(job.keys[number + 1])
    resumed = work.is_dir() and any(work.iterdir())
    work.mkdir(parents=True, exist_ok=True)
    context = make_context(job, number, bundle, work)
    started = time.monotonic()
    with OwnPeak() as peak:
        bundle = step_named(step.name).function()(bundle, step.settings, context)
    seconds = time.monotonic() - started
    notes = {"resumed": True} if resumed else {}  # seconds and memory are those of this run alone then
    record = StepRecord(
        name=step.name,
        settings=step.settings.model_dump(mode="json"),
        seconds=seconds,
        notes={**context.notes, **notes, "peak_memory_bytes": peak.bytes, "after": after(job, bundle)},
    )
    bundle.steps = (*bundle.steps, record)
    keep(job, number + 1, bundle)
    shutil.rmtree(work, ignore_errors=True)
    return bundle


def make_context(job: Job, number: int, bundle: Bundle, work: Path) -> Context:
    def reference() -> Bundle:
        if number < job.leading:
            raise StepError("a step after the reference is made", "one before", "put finetune first")
        return reopen(job, job.leading)

    return Context(
        task=job.task,
        seed=job.recipe.seed,
        work=work,
        reference=reference,
        load=partial(open_other, job.recipe, job.task, bundle),
        accept=job.recipe.accept,
        progress=job.progress,
        teacher_cache=job.cache.teachers,
        tables=job.cache.tables,
        threads=job.recipe.measure.threads,
        columns=Columns(job.recipe.data.text, job.recipe.data.text_pair, None),
        reread=partial(examples, job, number),
        **examples(job, number, bundle),
    )


def examples(job: Job, number: int, bundle: Bundle) -> dict[str, Any]:
    """What step `number` may look at, in the tokens of `bundle`."""
    splits, texts = job.read_by(bundle)
    settings = job.recipe.steps[number].settings
    path = settings.unlabelled if isinstance(settings, TeacherSettings) else None
    return {
        "train": splits.train,
        "validation": splits.validation,
        "calibration": splits.calibration,
        "unlabelled": None if path is None else texts[path],
    }


def reopen(job: Job, number: int) -> Bundle:
    """The model after `number` steps, from the cache, with this run's tokenization limits."""
    bundle = restore(job.cache.prefix(job.keys[number]))
    return replace(bundle, encoder=bundle.encoder._replace(truncate=job.bundle.encoder.truncate))


def keep(job: Job, number: int, bundle: Bundle) -> None:
    """Write the model after `number` steps into the cache; the reference gets its fp32 engine file there, too."""
    if job.cached(number):
        return  # another process was quicker, and its entry may be in use
    with artifact.write_folder(job.cache.prefix(job.keys[number]), overwrite=True) as folder:
        manifest = save(bundle, folder)
        if number == job.leading:
            manifest = add_engine(job, bundle, folder, manifest)
        figures = {"result": static_figures(bundle)}
        artifact.write_manifest(folder, manifest.model_copy(update={"measurements": figures}))


def add_engine(job: Job, bundle: Bundle, folder: Path, manifest: Manifest) -> Manifest:
    """Export to onnxruntime and hold the file against torch on real inputs. Raises ExportError where they differ, and
    ModelError where the model's own activations are no numbers (the layer named)."""
    check_finite(bundle, real_inputs(job, bundle, 8))
    job.progress.note("exporting to onnxruntime")
    engine = onnxruntime.export(bundle, folder)
    worst = check(bundle, folder, engine, real_inputs(job, bundle))
    return manifest.model_copy(update={"engines": {"onnxruntime": engine.model_copy(update={"parity": worst})}})


def share_engines(job: Job, bundle: Bundle, folder: Path, manifest: Manifest) -> Manifest:
    """Hold onnxruntime's file against torch in every further engine that was asked for. Raises ExportError, EngineError."""
    engines = dict(manifest.engines)
    for name in job.recipe.measure.engines:
        job.progress.note(f"checking the file in {name}")
        entry = engines["onnxruntime"]
        worst = check(bundle, folder, entry, real_inputs(job, bundle), name)
        engines[name] = entry.model_copy(update={"parity": worst})
    return manifest.model_copy(update={"engines": engines})


def real_inputs(job: Job, bundle: Bundle, number: int = 32, batch: int = 8) -> list[dict[str, NDArray[np.int64]]]:
    """A few batches of the user's texts in the bundle's tokens; neutral ones of ours where there are none."""
    splits, _ = job.read_by(bundle)
    some = splits.eval or splits.validation or bundle.encoder._replace(truncate=True).examples(TEXTS)
    rows = range(min(number, len(some)))
    return [some.batch(rows[i : i + batch], bundle.encoder.pad) for i in range(0, len(rows), batch)]


def after(job: Job, bundle: Bundle) -> dict[str, float]:
    """Where the model stands after a step: weights, bytes they take, and the metric on the validation examples."""
    found = {key: figure.value for key, figure in weights(bundle).items()}
    found["bytes"] = sum(figure.value for figure in part_bytes(bundle).values())
    validation = job.read_by(bundle)[0].validation
    if validation is not None and validation.labels is not None:
        with simulate(bundle):
            found["quality"] = job.task.metrics(predict(bundle, validation), validation)[job.task.metric]
    return found
