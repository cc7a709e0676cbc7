"""What gates cost, and the units that stay within a budget once training has said how likely each of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from flyweight.methods.prune.gates import WIDTH, Gates, is_layers, is_part, part_of
from flyweight.methods.prune.scores import Group

__all__ = ["Price", "least", "likeliest", "settled"]

Kept = dict[Group, list[int]]
"""{group: units that stay}; of layers and parts the blocks that have them"""
DIMENSIONS = 8
"""Of the stream go in multiples of this: products of odd widths are slow."""


@dataclass(frozen=True)
class Price:
    """What a shape costs, in any unit.

    base:   what no gate can save
    parts:  {heads of an attention or neurons of a block: [units + 1] cost if so many are kept}; a layer that goes costs nothing
    width:  dimensions of the residual stream, where they have gates
    narrow: the same of a model with one dimension; all costs lie on a straight line between the two
    """

    base: float
    parts: Mapping[Group, Tensor]
    width: int = 1
    narrow: Price | None = None

    def expected(self, shares: Mapping[Group, Tensor]) -> Tensor:
        """Of gates that are open with these probabilities, a scalar; differentiable."""
        whole = self._expected(shares)
        if self.narrow is None or WIDTH not in shares:
            return whole
        least = self.narrow._expected(shares)
        return least + (shares[WIDTH].sum() - 1) / (self.width - 1) * (whole - least)

    def at(self, width: int) -> Price:
        """Of a model with so many dimensions."""
        if self.narrow is None or width == self.width:
            return replace(self, narrow=None)
        share, few = (width - 1) / (self.width - 1), self.narrow
        parts = {group: few.parts[group] + share * (curve - few.parts[group]) for group, curve in self.parts.items()}
        return Price(few.base + share * (self.base - few.base), parts)

    def _expected(self, shares: Mapping[Group, Tensor]) -> Tensor:
        first = next(iter(shares.values()))
        total = first.new_tensor(self.base)
        for group, curve in self.parts.items():
            curve = curve.to(first)
            there = _there(shares, part_of(group), group.block, first)
            cost = curve[0] + there * (_between(curve, shares[group].sum()) - curve[0])
            total = total + _there(shares, Group(group.stack), group.block, first) * cost
        return total

    def total(self, keep: Mapping[Group, Sequence[int]]) -> float:
        """Of the units kept; groups of layers name the layers that stay."""
        if self.narrow is not None and WIDTH in keep:
            return self.at(len(keep[WIDTH])).total(keep)
        found = self.base
        for group, curve in self.parts.items():
            layers = keep.get(Group(group.stack))
            if layers is None or group.block in layers:
                found += float(curve[len(keep[group])])
        return found

    @property
    def whole(self) -> float:
        return self.base + sum(float(curve[-1]) for curve in self.parts.values())


def _there(shares: Mapping[Group, Tensor], gates: Group, block: int | None, like: Tensor) -> Tensor:
    found = shares.get(gates)
    return like.new_ones(()) if found is None or block is None else found[block]


def _between(curve: Tensor, count: Tensor) -> Tensor:
    """The curve at a number between two whole ones, on a straight line."""
    low = min(int(count.detach()), len(curve) - 2)
    return curve[low] + (count - low) * (curve[low + 1] - curve[low])


def settled(gates: Gates, price: Price, budget: float, multiple_of: int = 1) -> Kept:
    """Units that stay, those most likely open first, at a cost within the budget.

    Layers and parts of blocks stay where they are more likely open than not; of each stack one layer at least, and every part
    that stays keeps at least one unit (neurons: `multiple_of`). Then the most likely unit of all is taken as long as the budget
    allows. Layers and parts go on going, least likely first, where even the least is too dear, at last dimensions of the stream.
    Raises ValueError where one layer of each stack is.
    """
    shares = {group: share.detach().cpu() for group, share in gates.open().items()}
    if (share := shares.pop(WIDTH, None)) is None:
        keep = _within(shares, price, budget, multiple_of)
    else:
        keep = _with_width(share, shares, price, budget, multiple_of)
    if keep is None:
        raise ValueError("no shape within the budget")
    return keep


def _with_width(
    share: Tensor, shares: Mapping[Group, Tensor], price: Price, budget: float, multiple_of: int
) -> Kept | None:
    """As many dimensions as are expected to be open, fewer where no shape of that width is within the budget, more where one that
    lacks nothing leaves some of it."""
    size = min(DIMENSIONS, len(share))
    count = min(max(size * round(float(share.sum()) / size), size), len(share))
    keep = _within(shares, price.at(count), budget, multiple_of)
    while keep is None and count > size:
        count = size * ((count - 1) // size)
        keep = _within(shares, price.at(count), budget, multiple_of)
    if keep is None:
        return None
    while count < len(share) and price.at(min(count + size, len(share))).total(keep) <= budget:
        count = min(count + size, len(share))
    best = share.argsort(descending=True, stable=True)[:count]
    return {**keep, WIDTH: sorted(best.tolist())}


def _within(shares: Mapping[Group, Tensor], price: Price, budget: float, multiple_of: int) -> Kept | None:
    there = {group: likeliest(share) for group, share in shares.items() if is_layers(group)}
    there |= {group: (share > 0.5).nonzero()[:, 0].tolist() for group, share in shares.items() if is_part(group)}
    while True:
        keep = _filled(shares, there, price, budget, multiple_of)
        if keep is not None:
            return keep
        spare = [
            (float(shares[group][n]), group, n)
            for group, stay in there.items()
            for n in stay
            if (len(stay) > 1 if is_layers(group) else n in there.get(Group(group.stack), stay))
        ]
        if not spare:
            return None
        _, group, number = min(spare, key=lambda one: one[0])
        there[group] = [n for n in there[group] if n != number]


def likeliest(share: Tensor) -> list[int]:
    """Those above a half, at least the best."""
    return sorted({*(share > 0.5).nonzero()[:, 0].tolist(), int(share.argmax())})


def _filled(
    shares: Mapping[Group, Tensor],
    there: Mapping[Group, list[int]],
    price: Price,
    budget: float,
    multiple_of: int,
) -> Kept | None:
    """None where the least of everything costs more than the budget."""
    counts: dict[Group, int] = {}
    steps: list[tuple[float, Group, int]] = []
    for group, share in shares.items():
        if group.block is None:
            continue
        size = multiple_of if group.attention is None else 1
        gone = group.block not in there.get(part_of(group), [group.block])
        counts[group] = 0 if gone else min(size, len(share))
        order = share.sort(descending=True).values
        grows = not gone and group.block in there.get(Group(group.stack), [group.block])
        for start in range(counts[group], len(share), size) if grows else ():
            steps.append((float(order[start : start + size].mean()), group, min(size, len(share) - start)))
    best = {group: share.argsort(descending=True, stable=True) for group, share in shares.items()}

    def kept() -> Kept:
        return {**there, **{group: sorted(best[group][:count].tolist()) for group, count in counts.items()}}

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


def least(price: Price, multiple_of: int) -> Kept:
    """One layer a stack, with one head and the fewest neurons, in the fewest dimensions where they may go."""
    sizes = {group: multiple_of if group.attention is None else 1 for group in price.parts}
    units = {group: list(range(min(size, len(price.parts[group]) - 1))) for group, size in sizes.items()}
    width = {} if price.narrow is None else {WIDTH: list(range(min(DIMENSIONS, price.width)))}
    return {**{Group(group.stack): [0] for group in price.parts}, **units, **width}
