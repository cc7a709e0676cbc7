"""What every block keeps under a budget, by dynamic programming over a table of costs and one of losses.

    min sum_g loss_g(k_g)   such that   base + sum_g cost_g(k_g) <= budget

over the units k_g that each group (the heads of an attention, the neurons of a block) may keep: Kurtic et al. 2023 (ZipLM),
section 3.2, after Frantar and Alistarh 2022 (SPDY). What a group costs beyond its cheapest choice is counted in steps of 1/10,000
of what the budget leaves for such, rounded up: over these steps the choice is exact, and the budget is never exceeded.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flyweight.errors import StepError
from flyweight.measure.costs import Costs, Kind, Shapes, kept
from flyweight.methods.prune.scores import Group

__all__ = ["Chosen", "Options", "best", "choose", "options_of"]

STEPS = 10_000
EDGE = 1e-9  # of a step: a cost that is a whole number of steps but for rounding of floats stays one

G = TypeVar("G", bound=Hashable)


@dataclass(frozen=True)
class Options:
    """What a group may keep: kept [n] units, loss [n] of the task, cost [n], each at the same position."""

    kept: NDArray[np.int64]
    loss: NDArray[np.float64]
    cost: NDArray[np.float64]


@dataclass(frozen=True)
class Chosen(Generic[G]):
    """kept: {group: units}; cost: of the whole model by the table; speedup: the reference's against it; loss: summed"""

    kept: dict[G, int]
    cost: float
    speedup: float
    loss: float


def choose(
    losses: Mapping[Group, ArrayLike],
    costs: Costs,
    shapes: Shapes,
    speedup: float,
    multiple_of: int = 1,
    reference: float | None = None,
) -> Chosen[Group]:
    """The shapes of least loss that cost at most 1/`speedup` of what the reference costs.

    losses:      {group: [units + 1], the loss of keeping k of its units; entry 0 is no number where the group's part is not to
                 go altogether}. Groups that are not there keep all they have
    shapes:      of the model at hand (`surgery.shapes`)
    multiple_of: neurons kept are multiples of this, or all of them
    reference:   what it costs, by default as much as the model at hand

    Raises StepError where even the cheapest shapes cost more, with them and the speed-up they come to, and for NaN in a loss.
    """
    now = costs.total(shapes)
    reference = now if reference is None else reference
    options = options_of(losses, costs, shapes, multiple_of)
    whole = sum(float(costs.curves[kind_of(group)][units_of(shapes, group)]) for group in losses)
    cheapest = sum(float(one.cost.min()) for one in options.values())
    floor = now - whole + cheapest
    if floor > reference / speedup:
        raise StepError(
            f"a speedup of at most {np.floor(100 * reference / floor) / 100:g}, which is what the table of costs gives when "
            f"every block keeps the least, {_least(options)} ({floor:.4g} of {reference:.4g} {costs.unit})",
            f"{speedup:g}",
            "ask for less, or prune layers first",
        )
    found = best(options, reference / speedup - (now - whole))
    rows = [(options[group], options[group].kept == units) for group, units in found.items()]
    cost = now - whole + sum(float(one.cost[row][0]) for one, row in rows)
    return Chosen(found, cost, reference / cost, sum(float(one.loss[row][0]) for one, row in rows))


def options_of(
    losses: Mapping[Group, ArrayLike], costs: Costs, shapes: Shapes, multiple_of: int = 1
) -> dict[Group, Options]:
    """What every group may keep: any number of heads, neurons in multiples; none of them where both the loss and the cost of that
    are known. Raises StepError, ValueError."""
    found = {}
    for group, given in losses.items():
        loss, units = np.asarray(given, dtype=np.float64), units_of(shapes, group)
        if loss.shape != (units + 1,):
            raise ValueError(f"{units + 1} losses of {group} are needed, from 0 units to {units}, not {loss.shape}")
        if not np.isfinite(loss[1:]).all():
            raise StepError(f"losses of {group} that are numbers", "NaN or infinity", "check the model and its data")
        step, curve = multiple_of if group.attention is None else 1, costs.curves[kind_of(group)]
        gone = [0] if np.isfinite(loss[0]) and np.isfinite(curve[0]) else []
        some = np.unique([*gone, *range(step, units, step), units])
        found[group] = Options(some, loss[some], curve[some])
    return found


def _least(options: Mapping[Group, Options]) -> str:
    """`1 head and 16 neurons`: the fewest that any block keeps."""
    fewest: dict[str, int] = {}
    for group, one in options.items():
        unit = "neuron" if group.attention is None else "head"
        fewest[unit] = min(fewest.get(unit, int(one.kept[0])), int(one.kept[0]))
    return " and ".join(f"{units} {unit}{'' if units == 1 else 's'}" for unit, units in fewest.items())


def kind_of(group: Group) -> Kind:
    return Kind(group.stack, group.attention)


def units_of(shapes: Shapes, group: Group) -> int:
    assert group.block is not None
    return kept(shapes[group.stack][group.block], kind_of(group))


def best(options: Mapping[G, Options], budget: float, steps: int = STEPS) -> dict[G, int]:
    """{group: units kept} of least summed loss at a summed cost of at most `budget`; of equals the cheaper.

    Raises ValueError where the cheapest options exceed the budget.
    """
    least = {group: float(one.cost.min()) for group, one in options.items()}
    room = budget - sum(least.values())
    if room < -EDGE * abs(budget):
        raise ValueError(f"a budget of at least {sum(least.values())} is needed, not {budget}")
    step = max(room, 0.0) / steps
    value = np.zeros(steps + 1)  # [c]: the least loss of the groups so far within c steps
    taken: dict[G, NDArray[np.int64]] = {}
    for group, one in options.items():
        value, taken[group] = _add(value, one.loss, _in_steps(one.cost - least[group], step))
    found: dict[G, int] = {}
    left = steps
    for group in reversed(list(options)):
        one, number = options[group], taken[group][left]
        found[group] = int(one.kept[number])
        left -= int(_in_steps(one.cost[number] - least[group], step))
    return {group: found[group] for group in options}


def _in_steps(cost: ArrayLike, step: float) -> NDArray[np.int64]:
    """Rounded up; what no budget allows is beyond all of them."""
    cost = np.asarray(cost, dtype=np.float64)
    if step <= 0:
        return np.where(cost > 0, np.iinfo(np.int64).max, 0)
    return np.ceil(np.minimum(cost / step, 2**53) - EDGE).astype(np.int64)


def _add(
    value: NDArray[np.float64], loss: NDArray[np.float64], cost: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """One more group: (least loss within c steps, the option that gives it), both [steps + 1]."""
    steps = len(value) - 1
    after, taken = np.full(steps + 1, np.inf), np.zeros(steps + 1, np.int64)
    lowest = np.inf
    for number in np.lexsort((loss, cost)):  # cheap ones first: what costs more and loses no less is passed over
        if cost[number] > steps:
            break
        if loss[number] >= lowest:
            continue
        lowest = loss[number]
        begin = int(cost[number])
        offered = value[: steps + 1 - begin] + loss[number]
        better = offered < after[begin:]
        after[begin:][better] = offered[better]
        taken[begin:][better] = number
    return after, taken
