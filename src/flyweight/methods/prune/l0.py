"""Pruning by training: which layers, heads and neurons go is learned under a budget (CoFi, Xia et al. 2022).

The gates of `gates` are trained with the model. A Lagrangian holds their expected cost to a budget that falls over the first
part of the training; then the shape is settled, so that it meets the budget, and the rest of the steps train what is left.
The teacher's hidden states are matched to those student layers that come nearest, in order (section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.methods.prune.gates import Gates, gated, likely
from flyweight.methods.prune.scores import Group, groups, readers
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings
from flyweight.training import evaluating, find_device, keep_zeros, placed, train, validation
from flyweight.training.distillation import Distillation
from flyweight.training.lesson import Lesson, open_teacher
from flyweight.training.objective import answer
from flyweight.training.teacher import tap

__all__ = ["L0", "Price", "learn_shape", "matched", "settled"]

FALL, SETTLE = 0.4, 0.6
"""Shares of the steps: until the budget has fallen to the wish; until the shape is settled."""
GATE_RATE = 0.05
"""Learning rate of log alpha and of the multipliers (AdamW moves each by about so much a step)."""
MATCHED = 4
"""Teacher layers that are imitated, spread evenly."""


@dataclass(frozen=True)
class Price:
    """What a shape costs, in any unit.

    base:  what no gate can save
    parts: {heads of an attention or neurons of a block: [units + 1] cost if so many are kept}; a layer that goes costs nothing
    """

    base: float
    parts: Mapping[Group, Tensor]

    def expected(self, shares: Mapping[Group, Tensor]) -> Tensor:
        """Of gates that are open with these probabilities, a scalar; differentiable."""
        first = next(iter(shares.values()))
        total = first.new_tensor(self.base)
        for group, curve in self.parts.items():
            total = total + _alive(shares, group) * _between(curve.to(first), shares[group].sum())
        return total

    def total(self, keep: Mapping[Group, Sequence[int]]) -> float:
        """Of the units kept; groups of layers name the layers that stay."""
        found = self.base
        for group, curve in self.parts.items():
            layers = keep.get(Group(group.stack))
            if layers is None or group.block in layers:
                found += float(curve[len(keep[group])])
        return found

    @property
    def whole(self) -> float:
        return self.base + sum(float(curve[-1]) for curve in self.parts.values())


def _alive(shares: Mapping[Group, Tensor], group: Group) -> Tensor:
    layers = shares.get(Group(group.stack))
    return shares[group].new_ones(()) if layers is None or group.block is None else layers[group.block]


def _between(curve: Tensor, count: Tensor) -> Tensor:
    """The curve at a number between two whole ones, on a straight line."""
    low = min(int(count.detach()), len(curve) - 2)
    return curve[low] + (count - low) * (curve[low + 1] - curve[low])


def settled(gates: Gates, price: Price, budget: float, multiple_of: int = 1) -> dict[Group, list[int]]:
    """Units that stay, those most likely open first, at a cost within the budget; every part that stays keeps at least one.

    Layers stay where they are more likely open than not. Then, from one unit (neurons: `multiple_of`) each, the most
    likely unit of all is taken as long as the budget allows. Layers go on going, least likely first, where even
    that is too dear. Raises ValueError where one layer of each stack is.
    """
    shares = {group: share.detach().cpu() for group, share in gates.open().items()}
    layers = {group: _most(share) for group, share in shares.items() if group.block is None}
    while True:
        keep = _filled(shares, layers, price, budget, multiple_of)
        if keep is not None:
            return keep
        spare = [(float(shares[group][n]), group, n) for group, stay in layers.items() if len(stay) > 1 for n in stay]
        if not spare:
            raise ValueError("no shape within the budget")
        _, group, number = min(spare)
        layers[group] = [n for n in layers[group] if n != number]


def _most(share: Tensor) -> list[int]:
    """Those above a half, at least the best."""
    return sorted({*(share > 0.5).nonzero()[:, 0].tolist(), int(share.argmax())})


def _filled(
    shares: Mapping[Group, Tensor],
    layers: Mapping[Group, list[int]],
    price: Price,
    budget: float,
    multiple_of: int,
) -> dict[Group, list[int]] | None:
    """None where the least of everything costs more than the budget."""
    counts: dict[Group, int] = {}
    steps: list[tuple[float, Group, int]] = []
    for group, share in shares.items():
        if group.block is None:
            continue
        size = multiple_of if group.attention is None else 1
        counts[group] = min(size, len(share))
        order = share.sort(descending=True).values
        there = group.block in layers.get(Group(group.stack), [group.block])
        for start in range(counts[group], len(share), size) if there else ():
            steps.append((float(order[start : start + size].mean()), group, min(size, len(share) - start)))
    best = {group: share.argsort(descending=True, stable=True) for group, share in shares.items()}

    def kept() -> dict[Group, list[int]]:
        return {**layers, **{group: sorted(best[group][:count].tolist()) for group, count in counts.items()}}

    cost = price.total(kept())
    if cost > budget:
        return None
    steps.sort(key=lambda step: -step[0])
    full: set[Group] = set()
    for _, group, more in steps:
        rise = float(price.parts[group][counts[group] + more] - price.parts[group][counts[group]])
        if group in full or cost + rise > budget:
            full.add(group)  # its further units are less likely still
            continue
        counts[group] += more
        cost += rise
    return kept()


def matched(errors: Tensor) -> list[int]:
    """For every teacher layer the student layer it goes with, never falling, at the least sum; errors: [teacher, student]."""
    rows, columns = errors.shape
    best = torch.zeros(rows, columns, dtype=torch.float64)
    came = torch.zeros(rows, columns, dtype=torch.long)
    for row in range(rows):
        before = best[row - 1] if row else torch.zeros(columns, dtype=torch.float64)
        least, where = before.cummin(0)
        best[row], came[row] = errors[row].double().cpu() + least, where
    found = [int(best[-1].argmin())]
    for row in range(rows - 1, 0, -1):
        found.append(int(came[row, found[-1]]))
    return found[::-1]


class L0(Distillation):
    """Distillation + hidden_weight * matched hidden states + lambda_1 r + lambda_2 r^2, r = expected cost / whole - budget.

    The multipliers rise where the others fall (section 3.1, after Wang et al. 2020).
    """

    def __init__(
        self, *given: Any, teacher: Bundle, gates: Gates, price: Price, share: float, multiple_of: int
    ) -> None:
        """given: see `Distillation`; share: the wish, cost that is left by cost of the whole."""
        super().__init__(*given)
        self.teacher, self.gates, self.price, self.share, self.multiple = teacher, gates, price, share, multiple_of
        self.multipliers = nn.ParameterList([torch.zeros(()), torch.zeros(())])
        for multiplier in self.multipliers:
            multiplier.register_hook(torch.neg)
        self.through = 0.0
        self.keep: dict[Group, list[int]] | None = None
        depth = {name: len(blocks) for name, blocks in surgery.blocks(teacher.model, teacher.family).items()}
        (count,) = depth.values() if self.settings.hidden_weight > 0 else (0,)
        self.taught = sorted({math.ceil((n + 1) * count / MATCHED) - 1 for n in range(MATCHED)}) if count else []

    def parameter_groups(self) -> list[dict[str, Any]]:
        own = [*self.gates.log_alpha, *self.multipliers]
        return [*super().parameter_groups(), {"params": own, "lr": GATE_RATE, "weight_decay": 0.0}]

    @property
    def budget(self) -> float:
        """Share of the whole cost that is allowed now."""
        return 1 - (1 - self.share) * min(self.through / FALL, 1.0)

    def loss(self, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        every = range(len(next(iter(surgery.blocks(self.student.model, self.student.family).values()))))
        with tap(self.student, every if self.taught else ()) as mine:
            total = super().loss(batch, indices)
        if self.taught:
            with tap(self.teacher, self.taught) as theirs, torch.no_grad():
                answer(self.teacher, batch)
            total = total + self.settings.hidden_weight * self._hidden(mine, theirs, batch["attention_mask"].bool())
        if self.keep is not None:
            return total
        missed = self.price.expected(self.gates.open()) / self.price.whole - self.budget
        linear, square = self.multipliers
        held: Tensor = total + linear * missed + square * missed.square()
        return held

    def _hidden(self, mine: Mapping[int, Tensor], theirs: Mapping[int, Tensor], real: Tensor) -> Tensor:
        """Mean squared distance over matched pairs; layers that are rather closed take no part."""
        (group,) = (group for group in self.gates.groups if group.block is None)
        there = self.keep[group] if self.keep is not None else _most(self.gates.open()[group].detach())
        errors = torch.stack(
            [
                torch.stack([(mine[s][real] - theirs[t][real]).float().square().mean() for s in there])
                for t in self.taught
            ]
        )
        pairs = matched(errors.detach())
        return errors[torch.arange(len(pairs)), torch.tensor(pairs)].mean()

    def after_step(self, step: int, total: int) -> None:
        self.through = step / total
        if self.keep is None and step >= min(math.ceil(SETTLE * total), total):
            self._settle()

    @torch.no_grad()
    def _settle(self) -> None:
        """Choose the shape. What a gate was worth without chance goes into the weights, so that the answers stay."""
        keep = settled(self.gates, self.price, self.share * self.price.whole, self.multiple)
        values = {group: torch.zeros_like(self.gates.alpha(group)) for group in self.gates.groups}
        for group, stay in keep.items():
            values[group][stay] = 1.0
            if group.block is None:
                continue
            worth = likely(self.gates.alpha(group))
            worth = torch.where(worth > 0, worth, torch.ones_like(worth))  # taken in by the budget
            for reader, size in readers(self.student, group):
                surgery.weight_2d(reader).mul_(worth.repeat_interleave(size))
        self.gates.fix(values)
        self.keep = keep

    def state_dict(self) -> dict[str, Any]:
        fixed = None if self.gates.fixed is None else {str(group): value for group, value in self.gates.fixed.items()}
        keep = None if self.keep is None else {str(group): stay for group, stay in self.keep.items()}
        return {**super().state_dict(), "through": self.through, "fixed": fixed, "keep": keep}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.through = state["through"]
        names = {str(group): group for group in self.gates.groups}
        self.gates.fixed = None if state["fixed"] is None else {names[n]: v for n, v in state["fixed"].items()}
        self.keep = None if state["keep"] is None else {names[n]: list(stay) for n, stay in state["keep"].items()}


def learn_shape(
    bundle: Bundle, settings: PruneSettings, context: Context, price: Price, share: float
) -> tuple[dict[Group, list[int]], dict[str, Any]]:
    """Train until the shape is settled and on to the end. Returns (units and layers that stay, notes of the training).

    The weights are the best after settling; nothing is cut yet. Raises StepError where teacher, texts and settings do not fit,
    where no shape costs so little, and where several stacks of blocks would have to be matched.
    """
    least = price.total(_least(bundle, settings.multiple_of, price)) / price.whole
    if least > share:
        raise StepError(
            f"a wish that one layer of one head and {settings.multiple_of} neurons meets, at most {1 / least:.3g}",
            f"{1 / share:.3g}",
            "lower it",
        )
    teacher = open_teacher(settings, context)
    if teacher.model is bundle.model:
        teacher = teacher.copy()
    lesson = Lesson.of(bundle, bundle, teacher, settings, context)
    stacks = surgery.blocks(bundle.model, bundle.family)
    if settings.hidden_weight > 0 and len(stacks) > 1:
        raise StepError("a model with one stack of blocks for hidden_weight", ", ".join(stacks), "set it to 0")
    gates = Gates({**groups(bundle, "layers"), **groups(bundle, "heads"), **groups(bundle, "neurons")})
    targets = lesson.targets()
    objective = L0(
        *(bundle, settings, () if targets is None else (targets,), lesson.labelled, None, lesson.identity),
        teacher=teacher,
        gates=gates,
        price=price,
        share=share,
        multiple_of=settings.multiple_of,
    )
    held = lesson.held_back()
    measure = validation(bundle, held)
    judge = None if measure is None else lambda: measure() if objective.keep is not None else math.nan
    device = find_device(context.device)
    with (
        gated(bundle, gates),
        keep_zeros(bundle.model, bundle.sparse),
        evaluating(teacher.model),
        placed(teacher.model, device),
    ):
        result = train(
            bundle.model,
            objective,
            lesson.examples,
            settings,
            seed=context.seed,
            pad=bundle.encoder.pad,
            work=context.work / "l0",
            evaluate=judge,
            progress=context.progress,
            device=context.device,
            what="pruning",
            key=f"{share}{'' if held is None else held.content_hash()}",
        )
    if objective.keep is None:
        raise StepError("at least one training step", f"{result.steps}", "raise epochs or max_steps")
    return objective.keep, result.notes()


def _least(bundle: Bundle, multiple_of: int, price: Price) -> dict[Group, list[int]]:
    """One layer a stack, with one head and the fewest neurons."""
    layers = {group: [0] for group in groups(bundle, "layers")}
    sizes = {group: multiple_of if group.attention is None else 1 for group in price.parts}
    return {**layers, **{group: list(range(min(size, len(price.parts[group]) - 1))) for group, size in sizes.items()}}
