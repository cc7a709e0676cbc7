"""Pruning by training: which layers, attentions, feed-forward parts, heads and neurons go is learned under a budget (CoFi, Xia et
al. 2022).

The gates of `gates` are trained with the model. A Lagrangian holds their expected cost to a budget that falls over the first
part of the training; then the shape is settled, so that it meets the budget, and the rest of the steps train what is left.
The teacher's hidden states are matched to those student layers that come nearest, in order (section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.measure.costs import Kind, removable
from flyweight.methods.prune.budget import Price, least, likeliest, settled
from flyweight.methods.prune.gates import WIDTH, Gates, gated, is_layers, likely, part_of
from flyweight.methods.prune.scores import Group, groups, readers
from flyweight.models import stream, surgery
from flyweight.models.bundle import Bundle
from flyweight.models.stream import width_of
from flyweight.settings import PruneSettings
from flyweight.training import evaluating
from flyweight.training.distillation import Distillation
from flyweight.training.lesson import Lesson, open_teacher
from flyweight.training.objective import answer
from flyweight.training.pair import same_tokens
from flyweight.training.teacher import tap

__all__ = ["L0", "learn_shape", "matched"]

FALL, SETTLE = 0.4, 0.6
"""Shares of the steps: until the budget has fallen to the wish; until the shape is settled."""
GATE_RATE = 0.05
"""Learning rate of log alpha and of the multipliers (AdamW moves each by about so much a step)."""
MISSED = 0.25
"""By so much more than wished for gates may cost at the end, as a share, before it is said that they had too little time."""
MATCHED = 4
"""Teacher layers that are imitated, spread evenly."""


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
        self.through, self.reached = 0.0, 1.0
        self.keep: dict[Group, list[int]] | None = None
        depth = {name: len(blocks) for name, blocks in surgery.blocks(teacher.model, teacher.family).items()}
        (count,) = depth.values() if self.settings.hidden_weight > 0 else (0,)
        self.map = self._map() if count else None
        self.taught = sorted({math.ceil((n + 1) * count / MATCHED) - 1 for n in range(MATCHED)}) if count else []

    def parameter_groups(self) -> list[dict[str, Any]]:
        own = [*self.gates.log_alpha, *self.multipliers]
        mapped = [] if self.map is None else [{"params": [self.map.weight], "weight_decay": 0.0}]
        return [*super().parameter_groups(), *mapped, {"params": own, "lr": GATE_RATE, "weight_decay": 0.0}]

    def _map(self) -> nn.Linear | None:
        """From the student's stream to the teacher's, where the student's may lose dimensions: W_layer of section 3.2."""
        if WIDTH not in self.gates.groups:
            return None
        made = nn.Linear(width_of(self.student), width_of(self.teacher), bias=False)
        nn.init.eye_(made.weight)
        return made.to(self.gates.log_alpha[0].device)

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
        (group,) = (group for group in self.gates.groups if is_layers(group))
        there = self.keep[group] if self.keep is not None else likeliest(self.gates.open()[group].detach())
        own = {s: mine[s][real] if self.map is None else self.map(mine[s][real]) for s in there}
        errors = torch.stack(
            [torch.stack([(own[s] - theirs[t][real]).float().square().mean() for s in there]) for t in self.taught]
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
        self.reached = float(self.price.expected(self.gates.open())) / self.price.whole
        keep = settled(self.gates, self.price, self.share * self.price.whole, self.multiple)
        values = {group: torch.zeros_like(self.gates.alpha(group)) for group in self.gates.groups}
        for group, stay in keep.items():
            values[group][stay] = 1.0
            worth = likely(self.gates.alpha(group))
            if group == WIDTH:
                _scale_stream(self.student, torch.where(worth > 0, worth, torch.ones_like(worth)))
            if group.block is None:
                continue
            if (part := part_of(group)) in keep:
                worth = worth * likely(self.gates.alpha(part))[group.block]
            worth = torch.where(worth > 0, worth, torch.ones_like(worth))  # taken in by the budget
            for reader, size in readers(self.student, group):
                surgery.weight_2d(reader).mul_(worth.repeat_interleave(size))
        self.gates.fix(values)
        self.keep = keep

    def state_dict(self) -> dict[str, Any]:
        fixed = None if self.gates.fixed is None else {str(group): value for group, value in self.gates.fixed.items()}
        keep = None if self.keep is None else {str(group): stay for group, stay in self.keep.items()}
        return {**super().state_dict(), "through": self.through, "reached": self.reached, "fixed": fixed, "keep": keep}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.through, self.reached = state["through"], state["reached"]
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
    few = least(price, settings.multiple_of)
    smallest = price.total(few) / price.whole
    if smallest > share:
        neurons = f"{settings.multiple_of} neuron{'s' if settings.multiple_of > 1 else ''}"
        width = f" in {len(few[WIDTH])} dimensions" if WIDTH in few else ""
        raise StepError(
            f"a wish that one layer of one head and {neurons}{width} meets, at most {math.floor(100 / smallest) / 100:g}",
            f"{1 / share:.3g}",
            "lower it",
        )
    teacher = open_teacher(settings, context)
    if teacher.model is bundle.model:
        teacher = teacher.copy()
    settings = _with_hidden_weight(settings, bundle, teacher)
    lesson = Lesson.of(bundle, bundle, teacher, settings, context)
    gates = Gates(_gate_sizes(bundle, settings))
    targets = lesson.targets()
    objective = L0(
        *(bundle, settings, () if targets is None else (targets,), lesson.labelled, None, lesson.identity),
        teacher=teacher,
        gates=gates,
        price=price,
        share=share,
        multiple_of=settings.multiple_of,
    )
    with gated(bundle, gates), evaluating(teacher.model):
        result = lesson.run(
            *(bundle, objective, settings, "pruning", "l0"), key=share, ready=lambda: objective.keep is not None
        )
    if objective.keep is None:
        raise StepError("at least one training step", f"{result.steps}", "raise epochs or max_steps")
    if objective.reached > (1 + MISSED) * share:
        context.progress.note(
            f"warning: when the shape was settled, gates expected {objective.reached:.3g} of the cost where {share:.3g} was "
            "wished for: the rest was taken by what little they had learned; train for more epochs"
        )
    return objective.keep, {**result.notes(), "gates": round(objective.reached, 4)}


def _scale_stream(bundle: Bundle, by: Tensor) -> None:
    """What gives the stream its dimensions, [dimensions]."""
    writers: list[nn.Module] = [*stream.norms(bundle.model, bundle.family)]
    if (entry := stream.projection(bundle.model, bundle.family)) is not None:
        writers.append(entry)
    for module in writers:
        for parameter in module.parameters():
            parameter.mul_(by.to(parameter) if parameter.ndim == 1 else by.to(parameter)[:, None])


def _gate_sizes(bundle: Bundle, settings: PruneSettings) -> dict[Group, int]:
    """{group: gates}: layers, heads, neurons, the parts that these make where they may go altogether, and the width."""
    found = {**groups(bundle, "layers"), **groups(bundle, "heads"), **groups(bundle, "neurons")}
    depth = {group.stack: count for group, count in found.items() if is_layers(group)}
    for group in list(found):
        kind = Kind(group.stack, group.attention)
        if group.block is not None and settings.removes_parts and removable(bundle, kind):
            found[part_of(group)] = depth[group.stack]
    if settings.width:
        found[WIDTH] = width_of(bundle)
    return found


def _with_hidden_weight(settings: PruneSettings, bundle: Bundle, teacher: Bundle) -> PruneSettings:
    """Unless it was given, hidden states count as much as answers, as in the paper (section 4.1), where they can be compared.

    Raises StepError where they were asked for and cannot.
    """
    stacks = surgery.blocks(bundle.model, bundle.family)
    if "hidden_weight" not in settings.model_fields_set:
        depth = [len(surgery.blocks(who.model, who.family)) for who in (bundle, teacher)]
        fits = depth == [1, 1] and same_tokens(teacher, bundle) and width_of(bundle) == width_of(teacher)
        return settings.model_copy(update={"hidden_weight": 1.0 if fits else 0.0})
    if settings.hidden_weight > 0 and len(stacks) > 1:
        raise StepError("a model with one stack of blocks for hidden_weight", ", ".join(stacks), "set it to 0")
    return settings
