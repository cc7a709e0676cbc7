"""Quality of one model, and all figures of several side by side. Artifacts need the base install alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flyweight.artifact import is_artifact, verify
from flyweight.context import NoProgress, Progress
from flyweight.engines.engine import Predictor, engine_named
from flyweight.errors import ArtifactError, SettingsError
from flyweight.extras import need
from flyweight.measure.quality import answers, quality, resamples
from flyweight.measure.static import STATIC
from flyweight.measure.suite import Candidate, Figures, Labelled, measure
from flyweight.runtime import neutral_batch
from flyweight.settings import DataSettings, MeasureSettings
from flyweight.splits import read_labelled
from flyweight.tasks import Task, task_named
from flyweight.tokenization import Encoder, open_encoder

__all__ = ["compare", "evaluate"]


@dataclass(frozen=True)
class Opened:
    """What is needed of a model to feed it: where it lies, task, encoder, labels, figures known of it."""

    folder: Path
    engine: str
    task: Task
    encoder: Encoder
    labels: tuple[str, ...] | None
    known: Figures
    batch: int

    def open(self, threads: int) -> Predictor:
        return engine_named(self.engine).open(self.folder, threads=threads)


def open_path(path: str | Path, engine: str, data: DataSettings) -> Opened:
    """An artifact as it is; any other model becomes an entry of the cache first and runs in torch."""
    if is_artifact(Path(path)):
        folder, manifest = Path(path), verify(Path(path))
    else:
        folder, engine = as_artifact(str(path), data), "torch"
        manifest = verify(folder)
    length = min(manifest.max_length, data.max_length or manifest.max_length)
    figures = manifest.measurements.get("result", {})
    return Opened(
        folder,
        engine,
        task_named(manifest.task),
        open_encoder(folder, manifest.pad_token_id, length, data.truncate),
        manifest.labels,
        {key: figure for key, figure in figures.items() if key.startswith(STATIC)},
        neutral_batch(manifest.activations),
    )


def as_artifact(model: str, data: DataSettings) -> Path:
    """A model folder or hub id as an artifact in the cache. Raises MissingExtra, ModelError."""
    for module in ("torch", "transformers"):
        need(module, f"run {model}, which is not an artifact")
    from flyweight.job import prepare
    from flyweight.recipe import Recipe
    from flyweight.run import run_steps

    job = prepare(Recipe(model=model, data=data.model_copy(update={"train": None, "eval": None, "validation": None})))
    run_steps(job)
    return job.reference_folder


def evaluate(
    path: str | Path,
    data: str | Path,
    *,
    settings: DataSettings | None = None,
    engine: str = "onnxruntime",
    threads: int = 1,
    progress: Progress | None = None,
) -> Figures:
    """Quality of an artifact or a model with a head on labelled data: {"quality.accuracy": Measurement, ...}.

    Raises DataError, ArtifactError, ModelError; SettingsError where the task has no labels to judge by.
    """
    settings = settings or DataSettings()
    opened = open_path(path, engine, settings)
    if not opened.task.labelled:
        raise SettingsError("a task with labels", f"'{opened.task.name}'", "use `flyweight compare` with its reference")
    examples = read_labelled(Path(data), settings, opened.task, opened.encoder, opened.labels)
    predictor = opened.open(threads)
    try:
        outputs = answers(predictor, examples, opened.encoder.pad, opened.batch, progress)
    finally:
        predictor.close()
    return quality(opened.task, outputs, examples, resamples(opened.task, outputs, examples))


def compare(
    paths: Sequence[str | Path],
    data: str | Path | None = None,
    *,
    settings: DataSettings | None = None,
    measured: MeasureSettings | None = None,
    engine: str = "onnxruntime",
    progress: Progress | None = None,
) -> dict[str, Figures]:
    """All figures of several artifacts (or models), interleaved in one run; the first is what the others are told against.

    Raises ArtifactError, ModelError, DataError; SettingsError where their tasks or labels differ.
    """
    if not paths:
        raise SettingsError("at least one path to compare", "none", "name artifacts or model folders")
    settings, measured = settings or DataSettings(), measured or MeasureSettings()
    names = short_names([Path(path) for path in paths])
    opened = {name: open_path(path, engine, settings) for name, path in zip(names, paths, strict=True)}
    first = opened[names[0]]
    known = {name: dict(one.known) for name, one in opened.items()}
    if len({figures["flops"].method for figures in known.values() if "flops" in figures}) > 1:
        (progress or NoProgress()).note("FLOPs are left out: they were counted at different lengths")
        for figures in known.values():
            figures.pop("flops", None)
    candidates = {}
    for name, one in opened.items():
        if one.task.name != first.task.name or set(one.labels or ()) != set(first.labels or ()):
            raise ArtifactError(
                f"models of one task and the same labels ({first.task.name}, {', '.join(first.labels or ()) or 'none'})",
                f"{one.task.name}, {', '.join(one.labels or ()) or 'none'} in {name}",
                "compare like with like",
            )
        labelled = None
        if data is not None and one.task.labelled:
            examples = read_labelled(Path(data), settings, one.task, one.encoder, one.labels)
            labelled = Labelled(one.task, examples, one.encoder.pad)
        size = one.encoder.tokenizer.get_vocab_size()
        candidates[name] = Candidate(
            partial(one.open, measured.threads), one.folder, one.engine, size, labelled, one.batch, known[name]
        )
    measured = measured.within(min(one.encoder.max_length for one in opened.values()))
    return measure(candidates, measured, references=names[:1], progress=progress)


def short_names(paths: Sequence[Path]) -> list[str]:
    """Folder names, made longer or numbered where two are alike."""
    names = [path.absolute().name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{path.absolute().parent.name}/{path.absolute().name}" for path in paths]
    return names if len(set(names)) == len(names) else [f"{i}: {name}" for i, name in enumerate(names, 1)]
