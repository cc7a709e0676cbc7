"""Heads and neurons under a wish: a table of what they cost, shapes of least loss, and tries until the wish is met.

A wish counts from the recipe's reference, as all gains do: `speedup: 2.0` after a step that came to 1.5x takes 1.33x more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from flyweight.errors import StepError
from flyweight.measure.blocks import costs_in, latency_costs
from flyweight.measure.costs import Costs, byte_costs, flop_costs
from flyweight.measure.latency import Point
from flyweight.measure.race import Race, Terms
from flyweight.methods.prune import structured
from flyweight.methods.prune.scores import groups
from flyweight.methods.prune.shapes import Chosen, choose
from flyweight.methods.prune.wish import measured, meet
from flyweight.models import surgery
from flyweight.training import checkpoint
from flyweight.training.device import weights

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.methods.prune.ranking import Losses, Ranking
    from flyweight.methods.prune.scores import Group
    from flyweight.methods.prune.structured import Keep
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["Wish", "against", "check_wish", "costs_for", "here", "terms", "wished"]


@dataclass(frozen=True)
class _Made:
    """A try: the cut model, what it keeps, and what the table says of it."""

    bundle: Bundle
    keep: Keep
    chosen: Chosen[Group]


def costs_for(bundle: Bundle, settings: PruneSettings, context: Context) -> Costs:
    """By `settings.cost`. Times come from the table that is given, one in the cache, or are measured.

    Raises EngineError, ExportError, StepError.
    """
    if settings.cost != "latency":
        return _counted(bundle, settings)
    if settings.table is not None:
        return costs_in(settings.table, here(bundle), terms(settings, context))
    folder = context.work / "tables" if context.tables is None else context.tables
    return latency_costs(here(bundle), terms(settings, context), folder, context.progress)


def _counted(bundle: Bundle, settings: PruneSettings) -> Costs:
    return byte_costs(bundle) if settings.cost == "bytes" else flop_costs(bundle, settings.shape[1])


def terms(settings: PruneSettings, context: Context) -> Terms:
    return Terms(settings.engine, settings.precision, Point(*settings.shape), context.threads)


@dataclass(frozen=True)
class Wish:
    """What a wish is told against.

    whole: what the recipe's reference costs, in the unit of the table
    race:  opens a model beside the reference; None where costs are counted
    notes: JSON: how much faster than the reference the model at hand is, where it is another
    """

    whole: float
    race: Race | None
    notes: dict[str, Any]


@contextmanager
def against(bundle: Bundle, costs: Costs, settings: PruneSettings, context: Context) -> Iterator[Wish]:
    """The reference of the recipe, held open as long as the `with` lasts.

    Where an earlier step has pruned or distilled, the model at hand is faster than the reference already: counted costs tell by
    how much, times are raced. Raises StepError where that is all that was wished for; EngineError, ExportError.
    """
    assert settings.speedup is not None
    dense = here(bundle)
    reference = here(context.reference())
    now = costs.total(surgery.shapes(dense.model, dense.family))
    alike = _sizes(reference) == _sizes(dense)
    if settings.cost != "latency":
        whole = now if alike else _whole(_counted(reference, settings), reference)
        yield Wish(whole, None, _start(whole / now, settings.speedup, alike))
        return
    with Race(reference, terms(settings, context), context.seed) as race:
        del reference  # the engine has it
        if alike:
            yield Wish(now, race, {})
            return
        with race.against(dense) as take:
            found = measured(take)
        context.progress.note(f"the model at hand is {found.value:.2f}x as fast as the reference")
        yield Wish(now * found.value, race, _start(found.value, settings.speedup, alike))


def _whole(costs: Costs, bundle: Bundle) -> float:
    return costs.total(surgery.shapes(bundle.model, bundle.family))


def _sizes(bundle: Bundle) -> tuple[Any, ...]:
    """Models of one kind with equal sizes cost the same."""
    parameters = {name: tuple(one.shape) for name, one in bundle.model.named_parameters()}
    return bundle.family.model_type, surgery.shapes(bundle.model, bundle.family), parameters


def _start(speedup: float, wish: float, alike: bool) -> dict[str, Any]:
    if not alike and speedup >= wish:
        raise StepError(
            f"a speedup above {speedup:.3g}, which the model at hand has against the reference already",
            f"{wish:g}",
            "leave the step out, or ask for more: speedup counts from the reference, earlier steps included",
        )
    return {} if alike else {"start": round(speedup, 4)}


def wished(bundle: Bundle, settings: PruneSettings, context: Context, ranking: Ranking) -> tuple[Keep, dict[str, Any]]:
    """The units that stay so that the model takes `settings.speedup` times less than the reference, and notes. Changes nothing.

    Kept below `context.work` once met, as times differ from run to run. Raises StepError: a wish that no shape meets, or that no
    try met.
    """
    about = (settings.model_dump(mode="json"), context.threads, context.seed, weights(bundle.model), ranking.scores)
    folder, key = context.work / "wish", checkpoint.content_hash("wish", *about)
    found = checkpoint.load(folder, key, context.progress.note)
    if found is None:
        keep, notes = _met(bundle, settings, context, ranking)
        found = {"key": key, "keep": {str(group): stay for group, stay in keep.items()}, "notes": notes}
        checkpoint.save(folder, found)
    return {group: found["keep"][str(group)] for group in ranking.losses}, found["notes"]


def check_wish(bundle: Bundle, settings: PruneSettings, context: Context) -> None:
    """Have the table, and refuse a wish that no shape meets by it, before units are scored. Raises as `costs_for`, StepError."""
    assert settings.speedup is not None
    dense = here(bundle)
    costs = costs_for(dense, settings, context)
    shapes = surgery.shapes(dense.model, dense.family)
    reference = here(context.reference())
    alike = _sizes(reference) == _sizes(dense)
    if settings.cost == "latency" and not alike:
        return  # only a race tells by how much the model at hand is faster
    whole = costs.total(shapes) if alike else _whole(_counted(reference, settings), reference)
    none = {group: np.zeros(units + 1) for group, units in groups(dense, settings.target).items()}
    multiple = math.lcm(settings.multiple_of, costs.multiple)
    choose(_allowed(none, settings), costs, shapes, settings.speedup, multiple, whole)


def _met(bundle: Bundle, settings: PruneSettings, context: Context, ranking: Ranking) -> tuple[Keep, dict[str, Any]]:
    assert settings.speedup is not None
    dense = here(bundle)
    costs = costs_for(dense, settings, context)
    shapes = surgery.shapes(dense.model, dense.family)
    multiple = math.lcm(settings.multiple_of, costs.multiple)
    losses = _allowed(ranking.losses, settings)
    with against(bundle, costs, settings, context) as wish:

        def make(factor: float) -> _Made:
            chosen = choose(losses, costs, shapes, factor, multiple, wish.whole)
            keep = structured.best(ranking.scores, chosen.kept)
            made = dense.copy()
            structured.cut(made, settings.target, keep)
            return _Made(made, keep, chosen)

        opened = wish.race
        race = None if opened is None else lambda made: opened.against(made.bundle)
        met = meet(settings.speedup, make, lambda made: made.chosen.speedup, race, context.progress)
    notes = {
        "wish": {
            **met.notes,
            **wish.notes,
            "cost": settings.cost,
            "expected_loss": round(met.model.chosen.loss, 6),
        },
        "costs": {"unit": costs.unit, "multiple_of": multiple, **costs.about},
    }
    return met.model.keep, notes


def _allowed(losses: Losses, settings: PruneSettings) -> Losses:
    """Without those of parts that go altogether where they are not to."""
    return losses if settings.removes_parts else {g: np.append(np.nan, lost[1:]) for g, lost in losses.items()}


def here(bundle: Bundle) -> Bundle:
    """On the CPU, where engines read it; a copy where it is elsewhere."""
    if bundle.device.type == "cpu":
        return bundle
    copied = bundle.copy()
    copied.model.to(torch.device("cpu"))  # type: ignore[arg-type]
    return copied
