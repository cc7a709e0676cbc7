"""What a model is made of, as numbers: how wide what its linears read is, and how far into a block it is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from flyweight.models import surgery

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle
    from flyweight.models.family import Stack

__all__ = ["Anatomy", "Place", "anatomy_of"]


class Place(NamedTuple):
    """Linears of a block that read one tensor.

    width:  of that tensor; outs: of the linears
    before: share of the block's multiply-adds that are done when it is there; after: when the linears have read it
    units:  heads or neurons in it, 0 for hidden states; what: "heads", "neurons" or ""
    """

    width: int
    outs: tuple[int, ...]
    before: float
    after: float
    units: int = 0
    what: str = ""

    @property
    def weights(self) -> int:
        return self.width * sum(self.outs)

    @property
    def size(self) -> int:
        """Columns a unit."""
        return self.width // max(self.units, 1)


class Anatomy(NamedTuple):
    """hidden: width of the hidden states; weights: all there are; blocks: of all stacks, places in order of execution"""

    hidden: int
    weights: int
    blocks: tuple[tuple[Place, ...], ...]

    @property
    def inside(self) -> int:
        """Weights of the blocks' linears."""
        return sum(place.weights for block in self.blocks for place in block)

    @property
    def places(self) -> list[Place]:
        return [place for block in self.blocks for place in block]

    def part(self, what: str) -> float:
        """Share of the blocks' weights that goes with all heads, or all neurons."""
        inside = 0
        for block in self.blocks:
            for before, place in zip((None, *block), block, strict=False):
                if place.what == what:
                    inside += place.weights + (before.weights if before is not None else 0)
        return inside / max(self.inside, 1)


def anatomy_of(bundle: Bundle) -> Anatomy:
    found = []
    lists = surgery.blocks(bundle.model, bundle.family)
    for name, stack in surgery.stacks(bundle.model, bundle.family).items():
        found += [_places(block, stack) for block in lists[name]]
    hidden = max((block[-1].outs[0] for block in found if block), default=1)
    return Anatomy(hidden, sum(one.numel() for one in bundle.model.parameters()), tuple(found))


def _places(block: nn.Module, stack: Stack) -> tuple[Place, ...]:
    """Attention after attention, then the neurons: q, k and v; o; up and gate; down."""
    rows: list[tuple[list[nn.Module], int, str]] = []
    for attention in stack.attention:
        makers = [block.get_submodule(path) for path in dict.fromkeys((attention.q, attention.k, attention.v))]
        rows.append((makers, 0, ""))
        rows.append(([block.get_submodule(attention.o)], surgery.layout(block, attention).units, "heads"))
    ups, down = surgery.mlp_linears(block, stack)
    rows += [(list(ups), 0, ""), ([down], surgery.weight_2d(down).shape[1], "neurons")]
    shapes = [[tuple(surgery.weight_2d(linear).shape) for linear in linears] for linears, _, _ in rows]
    whole = max(sum(out * width for some in shapes for out, width in some), 1)
    found: list[Place] = []
    done = 0
    for some, (_, units, what) in zip(shapes, rows, strict=True):
        now = done + sum(out * width for out, width in some)
        found.append(Place(some[0][1], tuple(out for out, _ in some), done / whole, now / whole, units, what))
        done = now
    return tuple(found)
