"""How much each head, neuron or layer matters: one number each, small ones go first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.context import Context, Progress
from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings
from flyweight.training import Loss, TaskObjective, accumulate

__all__ = ["Group", "Scores", "groups", "magnitude", "random", "readers", "sample", "score", "taylor", "visit"]


class Group(NamedTuple):
    """Units that are weighed against each other: the heads of one attention, one block's neurons, a stack's layers."""

    stack: str
    block: int | None = None
    attention: int | None = None

    def __str__(self) -> str:
        every = (
            "*" if self.block is None and self.attention is not None else self.block
        )  # of all blocks (`gates.part_of`)
        return ".".join(str(part) for part in (self.stack, every, self.attention) if part is not None)


Scores = dict[Group, Tensor]
"""{group: [units] float32}"""


def groups(bundle: Bundle, target: str) -> dict[Group, int]:
    """{group: number of units} in the model's order, without parts that have none left."""
    found: dict[Group, int] = {}
    for name, shapes in surgery.shapes(bundle.model, bundle.family).items():
        if target == "layers":
            found[Group(name)] = len(shapes)
            continue
        for number, shape in enumerate(shapes):
            for attention, heads in enumerate(shape.heads if "heads" in target else ()):
                found[Group(name, number, attention)] = len(heads)
            if "neurons" in target:
                found[Group(name, number)] = shape.neurons
    return {group: units for group, units in found.items() if units}


def readers(bundle: Bundle, group: Group) -> list[tuple[nn.Module, int]]:
    """(linear that reads the group's units, inputs a unit): o for heads, down for neurons; for a stack see `taylor`."""
    assert group.block is not None
    row = surgery.stacks(bundle.model, bundle.family)[group.stack]
    block = surgery.blocks(bundle.model, bundle.family)[group.stack][group.block]
    if group.attention is None:
        return [(surgery.mlp_linears(block, row)[1], 1)]
    attention = row.attention[group.attention]
    return [(block.get_submodule(attention.o), surgery.layout(block, attention).query)]


def score(bundle: Bundle, settings: PruneSettings, context: Context) -> Scores:
    """Scores of every unit of `settings.target` by `settings.criterion`: magnitude, random or taylor."""
    if settings.criterion == "magnitude":
        return magnitude(bundle, settings.target)
    if settings.criterion == "random":
        return random(bundle, settings.target, context.seed)
    found = taylor(bundle, settings, context)
    if settings.scope == "layer":
        return found
    # gradients differ in size from layer to layer: compare them at one length (Molchanov et al. 2017, section 2.2)
    return {group: summed / summed.norm().clamp(min=1e-30) for group, summed in found.items()}


def random(bundle: Bundle, target: str, seed: int) -> Scores:
    chance = torch.Generator().manual_seed(seed)
    return {group: torch.rand(size, generator=chance) for group, size in groups(bundle, target).items()}


@torch.no_grad()
def magnitude(bundle: Bundle, target: str) -> Scores:
    """Sum of |w| over all that would leave with the unit: rows of what makes it, columns of what reads it."""
    found: Scores = {}
    lists = surgery.blocks(bundle.model, bundle.family)
    present = surgery.stacks(bundle.model, bundle.family)
    if target == "layers":
        linears = set(surgery.linears(bundle.model, bundle.family).values())
        for name, blocks in lists.items():
            parts = [[m for m in block.modules() if m in linears] for block in blocks]
            sums = [sum(float(surgery.weight_2d(linear).abs().sum()) for linear in part) for part in parts]
            found[Group(name)] = torch.tensor(sums)
        return found
    for group, units in groups(bundle, target).items():
        assert group.block is not None
        row, block = present[group.stack], lists[group.stack][group.block]
        if group.attention is None:
            makers = surgery.mlp_linears(block, row)[0]
        else:
            attention = row.attention[group.attention]
            makers = [block.get_submodule(path) for path in dict.fromkeys((attention.q, attention.k, attention.v))]
        total = torch.zeros(units)
        for maker in makers:  # GPT-2's one linear holds all queries, then all keys, then all values
            thirds = 3 if group.attention is not None and row.attention[group.attention].fused else 1
            total += surgery.weight_2d(maker).abs().reshape(thirds, units, -1).sum((0, 2)).cpu()
        for reader, size in readers(bundle, group):
            total += surgery.weight_2d(reader).abs().reshape(-1, units, size).sum((0, 2)).cpu()
        found[group] = total
    return found


def taylor(bundle: Bundle, settings: PruneSettings, context: Context) -> Scores:
    """Sum over examples of |dL/dgate|: the first-order change of the loss when the unit goes.

    Heads: Michel et al. 2019, eq. 2; neurons: Molchanov et al. 2017, eq. 8. See `visit`.
    """
    if context.train is None or context.train.labels is None or not context.task.labelled:
        raise StepError(
            "labelled examples for Taylor scores", "none", "give them with --train, or set criterion to magnitude"
        )
    sizes = groups(bundle, settings.target)
    total = {group: torch.zeros(size, dtype=torch.float64) for group, size in sizes.items()}

    def each(gradients: dict[Group, Tensor], _: NDArray[np.int64]) -> None:
        for group, gradient in gradients.items():
            total[group] += gradient.double().abs().sum(0)

    data = sample(context.train, settings.samples, context.seed)
    visit(bundle, settings.target, TaskObjective(bundle, settings), data, each, context.progress, "Taylor scores")
    return {group: summed.float() for group, summed in total.items()}


def sample(examples: Examples, samples: int, seed: int) -> Examples:
    """At most `samples` of the examples, chosen by the seed, of like length side by side."""
    chosen = np.random.default_rng(seed).permutation(len(examples))[:samples]
    return examples.take(chosen[np.argsort(examples.lengths[chosen], kind="stable")])


def visit(
    bundle: Bundle,
    target: str,
    objective: Loss,
    data: Examples,
    each: Callable[[dict[Group, Tensor], NDArray[np.int64]], None],
    progress: Progress,
    what: str,
) -> float:
    """Hand `each` the gradients of every unit's gate, {group: [examples, units] float32 on the CPU}, batch after batch.

    A gate multiplies what the unit gives to the linear that reads it. Its gradient is the sum of gradient x weight over the
    unit's columns of that linear. The gates are per example, so that batches do not mix them; each gradient is that of its
    example's own loss. A layer's gate multiplies all that its block adds to the residual stream. Groups that the loss does
    not reach are missing. Returns the mean loss.
    """

    def batch(_: dict[str, Tensor], indices: NDArray[np.int64]) -> None:
        found = {g: gate.grad.float() for g, gate in live.items() if gate.grad is not None}
        each({group: (gradient * len(indices)).cpu() for group, gradient in found.items()}, indices)  # of a mean
        live.clear()

    live: dict[Group, Tensor] = {}
    with _gated(bundle, groups(bundle, target), live):
        return accumulate(
            bundle.model, objective, data, batch, pad=bundle.encoder.pad, names=(), progress=progress, what=what
        )


@contextlib.contextmanager
def _gated(bundle: Bundle, sizes: dict[Group, int], live: dict[Group, Tensor]) -> Iterator[None]:
    """While inside, every forward pass multiplies each unit by a gate of one, [examples, units], kept in `live`."""

    def hook(group: Group, units: slice, size: int) -> Callable[..., Any]:
        def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            inputs = args[0]  # [examples, tokens, units x size]
            if group not in live:
                live[group] = torch.ones(len(inputs), sizes[group], device=inputs.device, requires_grad=True)
            gate = live[group][:, None, units].repeat_interleave(size, dim=-1)
            return (inputs * gate.to(inputs.dtype), *args[1:])

        return multiply

    handles = []
    lists = surgery.blocks(bundle.model, bundle.family)
    for group, count in sizes.items():
        if group.block is not None:
            for reader, size in readers(bundle, group):
                handles.append(reader.register_forward_pre_hook(hook(group, slice(0, count), size)))
            continue
        for number, block in enumerate(lists[group.stack]):
            row = surgery.stacks(bundle.model, bundle.family)[group.stack]
            outs = [block.get_submodule(attention.o) for attention in row.attention]
            for reader in (*outs, surgery.mlp_linears(block, row)[1]):
                width = surgery.weight_2d(reader).shape[1]
                handles.append(reader.register_forward_pre_hook(hook(group, slice(number, number + 1), width)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
