"""Shapes learned in training (`l0`), priced by the same tables as those that are chosen, and cut at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from flyweight.errors import StepError
from flyweight.measure.costs import Costs, Shapes, byte_costs, flop_costs, kinds_of
from flyweight.measure.race import Race
from flyweight.methods.prune import structured
from flyweight.methods.prune.budget import Price
from flyweight.methods.prune.gates import WIDTH, is_layers
from flyweight.methods.prune.l0 import learn_shape
from flyweight.methods.prune.scores import Group, groups
from flyweight.methods.prune.shapes import kind_of, units_of
from flyweight.methods.prune.wish import SURE, measured, narrow
from flyweight.methods.prune.wished import against, costs_for, here, terms
from flyweight.models import stream, surgery

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["price_of", "prune_by_gates"]


def prune_by_gates(bundle: Bundle, settings: PruneSettings, context: Context) -> dict[str, Any]:
    """Train until a shape is settled and on to the end, and cut it, in place. Returns the step's notes.

    With `speedup` the shape costs so many times less than the reference by `settings.cost`, with `amount` that share of the
    blocks' weights goes. How fast the result is is measured and told: a training is not repeated for what a table was wrong by.
    Raises StepError as `learn_shape` and `wished.against` do.
    """
    shapes = surgery.shapes(bundle.model, bundle.family)
    if settings.width:
        _check_width(bundle, context)
    if settings.speedup is None:
        assert settings.amount is not None
        costs, share = byte_costs(bundle), 1 - settings.amount
    else:
        costs = costs_for(bundle, settings, context)
        with against(bundle, costs, settings, context) as wish:
            share = wish.whole / settings.speedup / costs.total(shapes)
    base = 0.0 if settings.speedup is None else costs.base
    price = price_of(costs, shapes, base)
    if settings.width:
        price = _with_width(price, bundle, settings, shapes, base)
    keep, training = learn_shape(bundle, settings, context, price, share)
    parts = groups(bundle, settings.target)
    notes = structured.cut(bundle, settings.target, {group: keep[group] for group in parts})
    whole = notes["parameters_before"]
    layers = structured.cut(bundle, "layers", {group: stay for group, stay in keep.items() if is_layers(group)})
    if settings.width:
        stream.keep_dimensions(bundle.model, bundle.family, keep[WIDTH])
        layers["parameters_after"] = sum(parameter.numel() for parameter in bundle.model.parameters())
        layers["plain"] = surgery.sync_config(bundle.model, bundle.family)
        notes["width"] = {"of": price.width, "kept": len(keep[WIDTH]), "priced": _priced_by(settings)}
    notes |= {
        "removed_layers": layers["removed"],
        "parameters_before": whole,
        "parameters_after": layers["parameters_after"],
        "plain": layers["plain"],
    }
    found = {
        "training": training,
        "price": {"share": share, "kept": price.total(keep) / price.whole, "unit": costs.unit},
    }
    if settings.speedup is not None and settings.cost == "latency":
        found["wish"] = {**_raced(bundle, settings, context), **wish.notes}
    return {**notes, **found}


def price_of(costs: Costs, shapes: Shapes, base: float) -> Price:
    """What a block costs without any units is spread evenly over the parts that it has, so that a layer that goes costs nothing;
    of a block that lost them all it belongs to the base.

    Where a part cannot go altogether, less than one unit is only ever expected: the curve goes straight on.
    """
    parts = {}
    for stack, blocks in shapes.items():
        curves = {kind: _from_nothing(costs.curves[kind]) for kind in kinds_of(costs.curves, stack)}
        rest = costs.block[stack] - sum(float(curve[1]) for curve in curves.values())
        for number, shape in enumerate(blocks):
            every = [Group(stack, number, attention) for attention in (*range(len(shape.heads)), None)]
            there = {group: units for group in every if (units := units_of(shapes, group))}
            base += 0.0 if there else rest
            for group, units in there.items():
                curve = curves[kind_of(group)][: units + 1] + rest / len(there)
                parts[group] = torch.from_numpy(np.maximum(curve, 0.0)).float()
    return Price(base, parts)


def _check_width(bundle: Bundle, context: Context) -> None:
    """Raises StepError where the hidden width cannot go."""
    if not context.task.labelled:
        raise StepError(
            "a task whose answers are classes for width",
            f"{context.task.name}, whose answers are the hidden states themselves",
            "leave out width",
        )
    stream.check(bundle.model, bundle.family, "width")


def _with_width(price: Price, bundle: Bundle, settings: PruneSettings, shapes: Shapes, base: float) -> Price:
    """Counted costs are exact, by a model with one dimension; times of blocks are taken to go with the width, an estimate: a
    table has no narrower blocks."""
    size = stream.width_of(bundle)
    if settings.speedup is not None and settings.cost == "latency":
        return replace(
            price, width=size, narrow=Price(price.base, {g: curve / size for g, curve in price.parts.items()})
        )
    thin = bundle.copy()
    stream.keep_dimensions(thin.model, thin.family, [0])
    counted = settings.speedup is not None and settings.cost == "flops"
    costs = flop_costs(thin, settings.shape[1]) if counted else byte_costs(thin)
    return replace(price, width=size, narrow=price_of(costs, shapes, 0.0 if settings.speedup is None else costs.base))


def _priced_by(settings: PruneSettings) -> str:
    estimated = settings.speedup is not None and settings.cost == "latency"
    return "estimated: times of blocks in proportion to the width" if estimated else "counted"


def _from_nothing(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """[units + 1]: what k units cost more than none."""
    gone = curve[0]
    if not np.isfinite(gone):
        gone = 2 * curve[1] - curve[2] if len(curve) > 2 else curve[1]
    return np.append(0.0, curve[1:] - gone)


def _raced(after: Bundle, settings: PruneSettings, context: Context) -> dict[str, Any]:
    assert settings.speedup is not None
    reference = here(context.reference())
    with Race(reference, terms(settings, context), context.seed) as race, race.against(here(after)) as take:
        found = measured(take, settings.speedup)
    low = found.low or 0.0
    context.progress.note(f"{found.value:.2f}x as fast as the reference, {settings.speedup:g}x was wished for")
    return {
        "wish": settings.speedup,
        "speedup": round(found.value, 4),
        "low": round(low, 4),
        "high": None if found.high is None else round(found.high, 4),
        "narrow": narrow(found),
        "met": low >= SURE * settings.speedup,
    }
