"""What a run will cost, before it runs: time from a few timed batches of the real model on the real lengths, memory from what is
held now and what steps will hold, disk from sizes. `--dry-run` prints it; a run that cannot fit is refused by it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import NamedTuple

import psutil

from flyweight.errors import StorageError
from flyweight.job import Job
from flyweight.measure.environment import usable_memory
from flyweight.methods.prune.anatomy import anatomy_of
from flyweight.plan.speed import mean_length, timed
from flyweight.plan.steps import Model, cost, needs, share_left
from flyweight.plan.words import describe

__all__ = ["Plan", "PlanRow", "make_plan", "refuse_what_cannot_fit"]


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


def make_plan(job: Job) -> Plan:
    """Estimate every step of a prepared job. Takes a few seconds, since it times the model, with large models half a minute."""
    speed = timed(job, needs(job))
    held = int(psutil.Process().memory_info().rss)  # this process, and the model in it
    model = Model(job, speed, anatomy_of(job.bundle))
    total = model.anatomy.weights
    blocks = sum(p.numel() for name, p in job.bundle.model.named_parameters() if "embed" not in name)
    # Exporting the reference leaves about its size behind, in pieces that are not given back.
    exported = 0 if job.cached(job.leading) else 4 * total
    share, rows = 1.0, []
    for number, step in enumerate(job.recipe.steps):
        before, share = share, share * share_left(model, step.settings)
        cached = number < job.done
        found = cost(model, step.settings, before) if not cached else None
        rows.append(
            PlanRow(
                step.name,
                describe(step.settings),
                0.0 if found is None else found.seconds,
                held + (0 if found is None else found.bytes) + (exported if number >= job.leading else 0),
                0 if cached else int(4 * (total - blocks + blocks * share)),
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
            held + 8 * total + exported,
            int(4 * blocks * share),
            False,
        )
    )
    return Plan(tuple(rows))


def refuse_what_cannot_fit(plan: Plan, job: Job) -> None:
    """Raises StorageError when disk or memory are too small for the estimate; memory names the step that takes most."""
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
        most = max(plan.rows, key=lambda row: row.memory_bytes)
        raise StorageError(
            f"about {plan.memory_bytes / 1e9:.1f} GB of memory for {most.step}",
            f"a machine with {memory / 1e9:.1f} GB",
            "lower batch_size or samples, or take a smaller model",
        )
