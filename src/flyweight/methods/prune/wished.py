"""Heads and neurons under a wish: a table of what they cost, shapes of least loss, and tries until the wish is met."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flyweight.measure.blocks import latency_costs
from flyweight.measure.costs import Costs, byte_costs, flop_costs
from flyweight.measure.latency import Point
from flyweight.measure.race import Race, Terms
from flyweight.methods.prune import structured
from flyweight.methods.prune.shapes import Chosen, choose
from flyweight.methods.prune.wish import meet
from flyweight.models import surgery
from flyweight.training import checkpoint
from flyweight.training.device import weights

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.methods.prune.ranking import Ranking
    from flyweight.methods.prune.scores import Group
    from flyweight.methods.prune.structured import Keep
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["costs_for", "here", "terms", "wished"]


@dataclass(frozen=True)
class _Made:
    """A try: the cut model, what it keeps, and what the table says of it."""

    bundle: Bundle
    keep: Keep
    chosen: Chosen[Group]


def costs_for(bundle: Bundle, settings: PruneSettings, context: Context) -> Costs:
    """By `settings.cost`. Times come from a table in the cache, or are measured. Raises EngineError, ExportError, StepError."""
    if settings.cost == "flops":
        return flop_costs(bundle, settings.shape[1])
    if settings.cost == "bytes":
        return byte_costs(bundle)
    return latency_costs(here(bundle), terms(settings), _tables(context), context.progress)


def terms(settings: PruneSettings) -> Terms:
    return Terms(settings.engine, settings.precision, Point(*settings.shape))


def _tables(context: Context) -> Path:
    """Beside the other things that runs share; without a cache they last as long as the step's own state."""
    return context.work / "tables" if context.teacher_cache is None else context.teacher_cache.with_name("tables")


def wished(bundle: Bundle, settings: PruneSettings, context: Context, ranking: Ranking) -> tuple[Keep, dict[str, Any]]:
    """The units that stay so that the model takes `settings.speedup` times less, and notes; nothing is changed.

    Kept below `context.work` once met, as times differ from run to run. Raises StepError: a wish that no shape meets, or that no
    try met.
    """
    about = (settings.model_dump(mode="json"), context.seed, weights(bundle.model), ranking.scores)
    folder, key = context.work / "wish", checkpoint.content_hash("wish", *about)
    found = checkpoint.load(folder, key, context.progress.note)
    if found is None:
        keep, notes = _met(bundle, settings, context, ranking)
        found = {"key": key, "keep": {str(group): stay for group, stay in keep.items()}, "notes": notes}
        checkpoint.save(folder, found)
    return {group: found["keep"][str(group)] for group in ranking.losses}, found["notes"]


def _met(bundle: Bundle, settings: PruneSettings, context: Context, ranking: Ranking) -> tuple[Keep, dict[str, Any]]:
    assert settings.speedup is not None
    dense = here(bundle)
    costs = costs_for(dense, settings, context)
    shapes = surgery.shapes(dense.model, dense.family)
    multiple = math.lcm(settings.multiple_of, costs.multiple)

    def make(factor: float) -> _Made:
        chosen = choose(ranking.losses, costs, shapes, factor, multiple)
        keep = structured.best(ranking.scores, chosen.kept)
        made = dense.copy()
        structured.cut(made, settings.target, keep)
        return _Made(made, keep, chosen)

    with ExitStack() as closing:
        race = None
        if settings.cost == "latency":
            opened = closing.enter_context(Race(dense, terms(settings), context.seed))
            race = lambda made: opened.against(made.bundle)  # noqa: E731
        met = meet(settings.speedup, make, lambda made: made.chosen.speedup, race, context.progress)
    notes = {
        "wish": {**met.notes, "cost": settings.cost, "expected_loss": round(met.model.chosen.loss, 6)},
        "costs": {"unit": costs.unit, "multiple_of": multiple, **costs.about},
    }
    return met.model.keep, notes


def here(bundle: Bundle) -> Bundle:
    """On the CPU, where engines read it; a copy where it is elsewhere."""
    if bundle.device.type == "cpu":
        return bundle
    copied = bundle.copy()
    copied.model.to(torch.device("cpu"))  # type: ignore[arg-type]
    return copied
