"""What a model costs as a function of the heads and neurons that its blocks keep.

    total = base + sum over blocks of (a block that keeps one unit of each kind + what its further units add)

Attention and feed-forward part are taken to add up. Counted costs (multiply-adds, bytes) do so exactly; for times
`flyweight.measure.blocks` measures by how much they do not. Heads are counted in the units of `flyweight.models.surgery`: with
grouped-query attention one is a key-value head with the query heads that read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from flyweight.artifact import BlockShape
from flyweight.measure.flops import LENGTH, flops
from flyweight.models import surgery

if TYPE_CHECKING:
    from collections.abc import Callable

    from flyweight.models.bundle import Bundle
    from flyweight.models.family import Stack

__all__ = ["Costs", "Kind", "Shapes", "byte_costs", "flop_costs", "kept", "most_units", "removable"]

Shapes = Mapping[str, Sequence[BlockShape]]
"""{stack: what is left of each of its blocks}, as `surgery.shapes` gives it."""
FLOAT_BYTES = 4


class Kind(NamedTuple):
    """Units that cost alike in every block of a stack: the heads of one of its attentions, or, without one, the neurons."""

    stack: str
    attention: int | None = None

    def __str__(self) -> str:
        what = "neurons" if self.attention is None else "heads"
        return f"{self.stack} {what}{f' of attention {self.attention}' if self.attention else ''}"


@dataclass(frozen=True)
class Costs:
    """unit:     "ms", "FLOP" or "B"
    base:     what lies outside the blocks
    block:    {stack: a block that keeps one unit of each kind}
    curves:   {kind: [units + 1] float64}: what k units cost more than one does; entry 0, below zero, is that of a part which is
              gone, NaN where it cannot go or was not measured
    multiple: numbers of neurons that are multiples of this run best (1: it makes no difference)
    about:    JSON: what was counted or measured, on what, how sure it is
    """

    unit: str
    base: float
    block: dict[str, float]
    curves: dict[Kind, NDArray[np.float64]]
    multiple: int = 1
    about: dict[str, Any] = field(default_factory=dict)

    def total(self, shapes: Shapes) -> float:
        """Of a model with these shapes."""
        total = self.base
        for stack, blocks in shapes.items():
            total += len(blocks) * self.block[stack]
            for kind in kinds_of(self.curves, stack):
                total += sum(float(self.curves[kind][kept(shape, kind)]) for shape in blocks)
        return total


def kinds_of(curves: Mapping[Kind, Any], stack: str) -> list[Kind]:
    return [kind for kind in curves if kind.stack == stack]


def kept(shape: BlockShape, kind: Kind) -> int:
    """Units of this kind that a block has."""
    return shape.neurons if kind.attention is None else len(shape.heads[kind.attention])


def most_units(shapes: Shapes) -> dict[Kind, int]:
    """{kind: the most units that any block has}, in the model's order: attentions, then neurons; none that all blocks lack."""
    found: dict[Kind, int] = {}
    for stack, blocks in shapes.items():
        for attention in (*range(len(blocks[0].heads)), None):
            kind = Kind(stack, attention)
            if most := max(kept(shape, kind) for shape in blocks):
                found[kind] = most
    return found


def removable(bundle: Bundle, kind: Kind) -> bool:
    """Whether all units of this kind may go."""
    return surgery.least_units(bundle.model, bundle.family, *kind) == 0


def flop_costs(bundle: Bundle, length: int = LENGTH) -> Costs:
    """2 x multiply-adds of one item of `length` tokens, attention included: exactly what `flyweight.measure.flops` counts."""

    def block_flops(block: nn.Module, stack: Stack) -> float:
        linears = [module for module in block.modules() if isinstance(module, surgery.LINEARS)]
        widths = [surgery.layout(block, one) for one in stack.attention]
        scores = sum(4 * width.units * width.query * length**2 for width in widths)
        return sum(2 * length * surgery.weight_2d(linear).numel() for linear in linears) + scores

    def head_flops(block: nn.Module, stack: Stack, attention: int) -> float:
        query, products = _head(block, stack, attention)[:2]
        return 2 * length * products + 4 * query * length**2

    def neuron_flops(block: nn.Module, stack: Stack) -> float:
        return 2 * length * _neuron(block, stack)[0]

    about = {"counted": f"2 x multiply-adds of one item of {length} tokens, attention included"}
    return _counted(bundle, "FLOP", flops(bundle, length), block_flops, head_flops, neuron_flops, about)


def byte_costs(bundle: Bundle) -> Costs:
    """Bytes of all parameters in float32, shared ones once. A shared position bias counts as it is: it never grows."""

    def block_bytes(block: nn.Module, stack: Stack) -> float:
        return FLOAT_BYTES * sum(parameter.numel() for parameter in block.parameters())

    def head_bytes(block: nn.Module, stack: Stack, attention: int) -> float:
        _, products, biases = _head(block, stack, attention)
        return FLOAT_BYTES * (products + biases)

    def neuron_bytes(block: nn.Module, stack: Stack) -> float:
        return FLOAT_BYTES * sum(_neuron(block, stack))

    whole = FLOAT_BYTES * sum(parameter.numel() for parameter in bundle.model.parameters())
    about = {"counted": "bytes of all parameters in float32"}
    return _counted(bundle, "B", whole, block_bytes, head_bytes, neuron_bytes, about)


def _counted(
    bundle: Bundle,
    unit: str,
    whole: float,
    of_block: Callable[[nn.Module, Stack], float],
    of_head: Callable[[nn.Module, Stack, int], float],
    of_neuron: Callable[[nn.Module, Stack], float],
    about: dict[str, Any],
) -> Costs:
    """Costs that grow by the same amount with every unit."""
    shapes = surgery.shapes(bundle.model, bundle.family)
    most = most_units(shapes)
    each: dict[Kind, float] = {}
    block: dict[str, float] = {}
    for name, stack, module in _last_blocks(bundle):
        for kind in kinds_of(most, name):
            number = kind.attention
            each[kind] = of_neuron(module, stack) if number is None else of_head(module, stack, number)
        further = sum((kept(shapes[name][-1], kind) - 1) * cost for kind, cost in each.items() if kind.stack == name)
        block[name] = of_block(module, stack) - further
    curves: dict[Kind, NDArray[np.float64]] = {}
    for kind, units in most.items():
        curves[kind] = each[kind] * np.arange(-1, units, dtype=np.float64)
        if not removable(bundle, kind):
            curves[kind][0] = np.nan
    found = Costs(unit, 0.0, block, curves, about=about)
    return Costs(unit, whole - found.total(shapes), block, curves, about=about)


def _last_blocks(bundle: Bundle) -> Iterator[tuple[str, Stack, nn.Module]]:
    """The last one, as T5's first holds the position bias of all."""
    present = surgery.stacks(bundle.model, bundle.family)
    for name, modules in surgery.blocks(bundle.model, bundle.family).items():
        yield name, present[name], modules[len(modules) - 1]


def _head(block: nn.Module, stack: Stack, attention: int) -> tuple[int, int, int]:
    """(width of the queries, weights, biases) of one unit: its rows of q, k and v, its columns of o."""
    paths = stack.attention[attention]
    _, query, key = surgery.layout(block, paths)
    weights = surgery.weight_2d(block.get_submodule(paths.o)).shape[0] * query
    biases = 0
    for path, rows in ((paths.q, query), (paths.k, key), (paths.v, key)):
        linear = block.get_submodule(path)
        weights += rows * surgery.weight_2d(linear).shape[1]
        biases += rows * (linear.bias is not None)
    return query, weights, biases


def _neuron(block: nn.Module, stack: Stack) -> tuple[int, int]:
    """(weights, biases) of one neuron: its rows of what makes it, its column of what reads it."""
    ups, down = surgery.mlp_linears(block, stack)
    weights = sum(surgery.weight_2d(up).shape[1] for up in ups) + surgery.weight_2d(down).shape[0]
    return weights, sum(up.bias is not None for up in ups)
