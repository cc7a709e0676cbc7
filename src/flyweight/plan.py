"""What a run will cost, before it runs: time from a few timed batches of the real model on the real lengths, memory and disk
from its size. `--dry-run` prints it; a run that cannot fit is refused by it."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flyweight.errors import StorageError
from flyweight.job import Job
from flyweight.measure.environment import usable_memory
from flyweight.methods.quantize.expected import Sizes, expected
from flyweight.settings import DistillSettings, FinetuneSettings, PruneSettings, QuantizeSettings, TrainSettings

__all__ = ["Plan", "PlanRow", "make_plan", "refuse_what_cannot_fit"]

PROCESS = 700_000_000  # torch and transformers, loaded
KEPT = {
    "weights": 0.0,
    "heads": 1 / 3,
    "neurons": 2 / 3,
    "layers": 1.0,
    "vocabulary": 0.0,
}  # share of a block's work that a target touches


class PlanRow(NamedTuple):
    """seconds, memory_bytes (peak while it runs), disk_bytes (left in the cache or in the artifact) are estimates."""

    step: str
    what: str
    seconds: float
    memory_bytes: int
    disk_bytes: int
    cached: bool


@dataclass(frozen=True)
class Plan:
    """The rows of a run, in order."""

    rows: tuple[PlanRow, ...]

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def memory_bytes(self) -> int:
        return max(row.memory_bytes for row in self.rows)

    @property
    def disk_bytes(self) -> int:
        return sum(row.disk_bytes for row in self.rows)


class Speed(NamedTuple):
    """Seconds an example: forward, and forward + backward + update."""

    forward: float
    training: float


def make_plan(job: Job) -> Plan:
    """Estimate every step of a prepared job. Takes a few seconds, since it times the model."""
    speed = timed(job, any(trains(step.settings) for step in job.recipe.steps))
    total = sum(p.numel() for p in job.bundle.model.parameters())
    blocks = sum(p.numel() for name, p in job.bundle.model.named_parameters() if "embed" not in name)
    share, done, rows = 1.0, job.done, []
    steps = job.recipe.steps
    for number, step in enumerate(steps):
        settings = step.settings
        before, share = share, share * kept_share(job, settings)
        weights = int(4 * (total - blocks + blocks * share))
        if isinstance(settings, QuantizeSettings):
            seconds, beside = expected(settings, job.recipe.accept, sizes(job, speed, before))
            memory = 4 * total + beside
        else:
            seconds, factor = cost(job, settings, speed, before, share)
            memory = 4 * total + int(factor * weights)
        cached = number < done
        rows.append(
            PlanRow(
                step.name,
                describe(settings),
                0.0 if cached else seconds,
                PROCESS + memory,
                0 if cached else weights,
                cached,
            )
        )
    held_out = len(job.splits.eval) if job.splits.eval is not None else 0
    m = job.recipe.measure
    tokens = sum(m.lengths) * sum(m.batches) * m.rounds
    per_token = speed.forward / max(mean_length(job), 1.0)
    seconds = 20 + 3 * held_out * speed.forward + 2.5 * tokens * per_token
    rows.append(
        PlanRow(
            "export, measure, report",
            f"{held_out} held-out examples",
            seconds,
            PROCESS + 12 * total,
            int(4 * blocks * share),
            False,
        )
    )
    return Plan(tuple(rows))


def describe(settings: object) -> str:
    """The settings that say most about a step, as one phrase."""
    if isinstance(settings, PruneSettings):
        much = f"{settings.amount:.0%} of " if settings.amount else ""
        return f"{much}{settings.target} by {settings.criterion}" + (
            ", gradually" if settings.gradual == "cubic" else ""
        )
    if isinstance(settings, DistillSettings):
        layers = (
            settings.layers if isinstance(settings.layers, str) else "layers " + ", ".join(map(str, settings.layers))
        )
        width = f", width {settings.width}" if settings.width else ""
        return f"{layers}{width}, {settings.epochs:g} epochs, teacher {' + '.join(settings.teachers)}" + (
            ", with control" if settings.control else ""
        )
    if isinstance(settings, FinetuneSettings):
        return f"{settings.epochs:g} epochs at {settings.learning_rate:g}"
    assert isinstance(settings, QuantizeSettings)
    bits = f"{settings.bits} bits"
    if settings.bits_per_weight is not None:
        bits = f"{settings.bits_per_weight:g} bits on average"
    if settings.max_megabytes is not None:
        bits = f"bits for {settings.max_megabytes:g} MB in all"
    texts = f", {settings.samples} texts" if settings.calibrated else ""
    return f"{bits} {settings.scheme} by {settings.method}, activations {settings.activations}{texts}"


def kept_share(job: Job, settings: object) -> float:
    """Share of the blocks' work that is left after the step."""
    if isinstance(settings, PruneSettings) and settings.amount:
        return 1 - KEPT[settings.target] * settings.amount
    if isinstance(settings, DistillSettings):
        layers = sum(len(stack) for stack in job_blocks(job))
        if settings.layers == "every-other":
            return 0.5
        if not isinstance(settings.layers, str):
            return min(1.0, len(settings.layers) / max(layers, 1))
    return 1.0


def job_blocks(job: Job) -> list[list[object]]:
    from flyweight.models.surgery import blocks

    return [list(stack) for stack in blocks(job.bundle.model, job.bundle.family).values()]


def sizes(job: Job, speed: Speed, share: float) -> Sizes:
    """What the expected cost of a quantize step is told from; share: of the blocks' work that is left by then."""
    from flyweight.models.surgery import embeddings, linears, weight_2d

    bundle, splits = job.bundle, job.splits
    shapes = [tuple(weight_2d(module).shape) for module in linears(bundle.model, bundle.family).values()]
    kept = [(round(rows * share), width) for rows, width in shapes]
    tables = sum(weight_2d(table).numel() for table in embeddings(bundle.model, bundle.family).values())
    return Sizes(
        forward=speed.forward * share,
        training=speed.training * share,
        length=mean_length(job),
        linears=kept,
        blocks=sum(len(stack) for stack in job_blocks(job)),
        weights=tables + sum(rows * width for rows, width in kept),
        model=sum(p.numel() for p in bundle.model.parameters()),
        texts=len(splits.calibration) if splits.calibration is not None else 0,
        train=len(splits.train) if splits.train is not None else 0,
        validation=len(splits.validation) if splits.validation is not None else 0,
    )


def cost(job: Job, settings: object, speed: Speed, before: float, share: float) -> tuple[float, float]:
    """Seconds, and memory as a multiple of the model's weights (weights + gradients + two moments + best weights)."""
    examples = len(job.splits.train) if job.splits.train is not None else 0
    if isinstance(settings, DistillSettings) and settings.unlabelled is not None:
        examples += len(job.unlabelled[settings.unlabelled])
    validation = len(job.splits.validation) if job.splits.validation is not None else 0
    trains = isinstance(settings, FinetuneSettings | DistillSettings)
    if isinstance(settings, PruneSettings):
        trains = settings.gradual == "cubic"
        if not trains:
            scored = min(settings.samples, examples) if settings.criterion == "taylor" else 0
            return 2 + speed.training * before * scored, 3.0
    if not trains or not isinstance(settings, TrainSettings):
        return 5.0, 2.0
    updates = math.ceil(examples / settings.batch_size) * settings.epochs
    updates = min(updates, settings.max_steps or updates)
    evaluations = settings.epochs * settings.evaluations_per_epoch * validation * speed.forward * share
    seconds = updates * settings.batch_size * speed.training * share + evaluations
    if isinstance(settings, DistillSettings):
        inside = (
            settings.hidden_weight + settings.embedding_weight + settings.attention_weight + settings.relation_weight
        )
        asked = updates * settings.batch_size * (len(settings.teachers) if settings.augment else int(inside > 0))
        asked += 0 if settings.augment else examples * len(settings.teachers)
        seconds = seconds * (2 if settings.control else 1) + asked * speed.forward
        return seconds, 6.0
    return seconds, 5.0


def mean_length(job: Job) -> float:
    for part in (job.splits.train, job.splits.calibration, job.splits.eval):
        if part is not None:
            return float(part.lengths.mean())
    return float(job.recipe.measure.within(job.bundle.encoder.max_length).lengths[-1])


def trains(settings: object) -> bool:
    """Whether the step takes gradients."""
    return not isinstance(settings, QuantizeSettings) or settings.method == "train"


def timed(job: Job, training_too: bool, batch: int = 16) -> Speed:
    """Time a forward and, where it is wanted, a training step on a batch of the data's mean length."""
    import torch

    model = job.bundle.model
    length = max(2, round(mean_length(job)))
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, model.config.vocab_size, (batch, length)))
    arrays = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def once(backward: bool) -> float:
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            answer = job.task.answer(model(**arrays), arrays)
            if backward:
                answer.sum().backward()  # type: ignore[no-untyped-call]
                model.zero_grad(set_to_none=True)
        return (time.perf_counter() - started) / batch

    training = model.training
    model.train(False)
    once(False)
    # In turn: another process may be busy for a while.
    turns = [(once(False), once(True) if training_too else 0.0) for _ in range(3)]
    forward, full = (min(column) for column in zip(*turns, strict=True))
    model.train(training)
    parameters = sum(p.numel() for p in model.parameters())
    return Speed(forward, full + 4e-10 * parameters)  # AdamW touches each parameter once a step of about 32


def refuse_what_cannot_fit(plan: Plan, job: Job) -> None:
    """Raises StorageError when disk or memory are too small for the estimate."""
    root = next(path for path in (job.cache.root, *job.cache.root.absolute().parents) if path.exists())
    free = shutil.disk_usage(root).free
    if plan.disk_bytes > free:
        raise StorageError(
            f"about {plan.disk_bytes / 1e9:.1f} GB of free disk at {root}",
            f"{free / 1e9:.1f} GB",
            "free space or set FLYWEIGHT_CACHE to another disk",
        )
    memory = usable_memory()
    if plan.memory_bytes > memory:
        raise StorageError(
            f"about {plan.memory_bytes / 1e9:.1f} GB of memory",
            f"a machine with {memory / 1e9:.1f} GB",
            "lower batch_size or take a smaller model",
        )
