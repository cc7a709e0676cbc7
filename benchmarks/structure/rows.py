"""Rows that run one command each: what is asked -> what it gave, judged and timed beside the reference."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import tuned
from benchmarks.command import Made, Other, last_step, made
from benchmarks.latency import beside
from benchmarks.models import MINILM, MPNET, Model
from benchmarks.runner import Job, Result, Row, load
from benchmarks.structure import vocabulary
from benchmarks.structure.asks import ASKS, PLAIN, Ask, reference_seed, row_name
from benchmarks.tuned import SEEDS
from flyweight import artifact
from flyweight.artifact import Measurement
from flyweight.engines.engine import Predictor, engine_named
from flyweight.measure.latency import Point
from flyweight.measure.size import disk
from flyweight.tokenization import open_encoder

POINTS = (Point(1, 128), Point(1, 32))
MEANT = f"speedup@{POINTS[0]}"
LIMIT_S = 25 * 60.0  # of a command; what it writes, judging and timing fit into the rest of 30 minutes
SPARE = 1.02  # what is asked for beyond the wish where two cuts make it up: each is met to 3 %


def reference(model: Model, seed: int) -> Path:
    return tuned.folder(model, reference_seed(model, seed))


def source(ask: Ask, job: Job) -> Other:
    """What the command is given, and what stands for it in the command as shown."""
    if ask.start == PLAIN:
        return Other(ask.model.folder(), ask.model.title)
    if ask.start:
        name = row_name(ask.model, ask.start, job.seed)
        return Other(job.near(name) / "artifact", name)
    return Other(reference(ask.model, job.seed), f"{ask.model.title}-tuned")


def needs(ask: Ask, seed: int) -> tuple[str, ...]:
    found = [row_name(ask.model, "fp32", reference_seed(ask.model, seed))]
    found += [row_name(ask.model, ask.start, seed)] if ask.start not in ("", PLAIN) else []
    found += [row_name(MPNET, "fp32", 0)] if "{mpnet}" in ask.flags else []
    return tuple(dict.fromkeys(found))


def arguments(ask: Ask, job: Job) -> list[str | Other]:
    """The flags with models in their places, and what is left of a wish; a trial takes few steps and texts."""
    models = {
        "{reference}": partial(reference, ask.model, job.seed),
        "{mpnet}": partial(reference, MPNET, 0),
        "{minilm}": MINILM.folder,
    }
    titles = {
        "{reference}": f"{ask.model.title}-tuned",
        "{mpnet}": f"{MPNET.title}-tuned",
        "{minilm}": MINILM.title,
    }
    flags: list[str | Other] = [
        Other(models[word](), titles[word]) if word in models else word for word in ask.flags.split()
    ]
    if ask.total is not None:
        flags += ["--speedup", f"{left(ask, job):.2f}"]
    if job.trial:
        trained = ask.verb != "prune" or "l0" in flags
        flags += ["--max-steps", "4"] if trained else ["--samples", "16"]
    return flags


def left(ask: Ask, job: Job) -> float:
    """How many times faster its start has to become. Raises SystemExit where it is as fast as wished already."""
    assert ask.total is not None
    record = load(job.table, row_name(ask.model, ask.start, job.seed))
    has = 1.0 if record is None else float(record["figures"][MEANT]["value"])
    lacks = SPARE * ask.total / has
    if lacks <= SPARE:
        raise SystemExit(f"error: expected a start that is slower than {ask.total:g}x, got {has:.2f}x; cut less before")
    return lacks


def run_ask(ask: Ask) -> Callable[[Job], Result]:
    def run(job: Job) -> Result:
        start = source(ask, job)
        files = {"--train": tuned.data(job)["train"]}
        done = made(job, ask.verb, start.path, arguments(ask, job), files, start.shown, LIMIT_S)
        out, whole = job.work / "artifact", reference(ask.model, job.seed)
        found = tuned.judge(job, out, opened(out), disk(out, "onnxruntime")["bytes"])
        times = beside(job, opened(out), opened(whole), words(out, whole), POINTS)
        figures = {**found.figures, **times, **told(done, out)}
        if "vocabulary" in ask.flags.split():
            figures |= vocabulary.figures(job, whole, out)
        if not ask.kept:
            shutil.rmtree(out)
        return found._replace(figures=figures, runs=[done.command])

    return run


def opened(folder: Path, engine: str = "onnxruntime") -> Predictor:
    return engine_named(engine).open(folder, threads=1)


def words(*folders: Path) -> int:
    """Random ids are drawn from what all of them know."""
    return min(open_encoder(folder, 0, 512).tokenizer.get_vocab_size() for folder in folders)


def told(done: Made, out: Path) -> dict[str, Measurement]:
    """What the command took, and how fast the step itself says that the result is."""
    found = done.figures(out)
    step = last_step(out, done.verb)
    wish = step.notes.get("wish") if step is not None else None
    if wish and wish.get("low") is not None:
        how = "as the step measured it against what it was given, or counted it"
        sides = {side: wish[side] for side in ("low", "high")}
        found["wish.speedup"] = Measurement(value=wish["speedup"], unit="x", n=wish.get("rounds"), method=how, **sides)
    return found


def rows(asks: Sequence[Ask] = ASKS) -> tuple[Row, ...]:
    """References first. Left for asking: MPNet, and all but the first seed."""
    found = [
        *(reference_row(MINILM, seed, 9) for seed in SEEDS),
        reference_row(MPNET, 0, 22),
    ]
    for ask in asks:
        for seed in ask.seeds:
            summary = f"{ask.summary}, seed {seed}"
            late = ask.asked or seed != SEEDS[0]
            found.append(Row(ask.row(seed), summary, ask.minutes, run_ask(ask), None, needs(ask, seed), late, seed))
    return tuple(found)


def reference_row(model: Model, seed: int, minutes: float) -> Row:
    """Fine-tuned here unless the table of quantization has done it: the recipe is the same."""
    summary = f"{model.title} fine-tuned, torch fp32, seed {seed}"
    late = model.key == MPNET.key or seed != SEEDS[0]
    return Row(row_name(model, "fp32", seed), summary, minutes, partial(tuned.make, model=model), None, (), late, seed)


def artifact_of(job: Job, row: str) -> Path:
    """Of another row. Raises SystemExit where it has none."""
    folder = job.near(row) / "artifact"
    if not artifact.is_artifact(folder):
        raise SystemExit(f"error: expected the artifact of {row}, got none; run that row again with --again")
    return folder
