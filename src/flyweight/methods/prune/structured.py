"""Which heads, neurons and layers go, and their physical removal."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from flyweight.errors import StepError
from flyweight.methods.prune.scores import Group, Scores, readers
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings

__all__ = ["Keep", "best", "check", "check_kept", "cut", "select", "silence"]

Keep = dict[Group, list[int]]
"""{group: positions of the units that stay, ascending}"""


def check(sizes: Mapping[Group, int], settings: PruneSettings) -> None:
    """Refuse an amount that comes to nothing or to everything, of heads or of neurons, layers.

    Raises StepError that names one that works.
    """
    for what, groups in _by_part(sizes).items():
        _check({group: sizes[group] for group in groups}, what, settings)


def _check(sizes: Mapping[Group, int], what: str, settings: PruneSettings) -> None:
    assert settings.amount is not None
    one, amount = what.removesuffix("s"), settings.amount
    if settings.scope == "global":
        most, least, of = sum(sizes.values()), 1, sum(sizes.values())
        room = most - len(sizes)
        gone = _round(amount * of)
    else:
        of = max(sizes.values())
        least, room = 1, of - 1
        gone = _round(amount * of)
    where = "over all blocks" if settings.scope == "global" else "in a block"
    if what == "layers":
        where = "over all stacks" if settings.scope == "global" else "in a stack"
    if room < least:
        raise StepError(f"more than one {one} {where} to prune {what}", "one", "prune something else")
    if gone < least:
        lowest = math.ceil(1000 * 0.5 / of) / 1000
        raise StepError(
            f"an amount that removes at least one {one} of {of} {where}", f"{amount}", f"raise it to {lowest:g} or more"
        )
    if gone > room:
        highest = math.floor(1000 * (room + 0.499) / of) / 1000
        raise StepError(
            f"an amount that leaves at least one {one} of {of} {where}", f"{amount}", f"lower it to {highest:g} or less"
        )
    rounded = settings.multiple_of if what == "neurons" else 1
    if settings.scope == "layer" and all(_up(n - _round(amount * n), rounded, n) == n for n in sizes.values()):
        raise StepError(
            f"an amount that removes neurons of {of} {where} in multiples of {rounded}",
            f"{amount}",
            "raise amount or lower multiple_of",
        )


def check_kept(keep: Mapping[Group, Collection[int]], sizes: Mapping[Group, int], settings: PruneSettings) -> None:
    """Refuse shapes that rounding has made whole again: over all blocks, scores decide who loses how many.

    Raises StepError.
    """
    for what, groups in _by_part(sizes).items():
        if all(len(keep[group]) == sizes[group] for group in groups):
            raise StepError(
                f"an amount that removes {what} over all blocks in multiples of {settings.multiple_of}",
                f"{settings.amount}",
                "raise amount or lower multiple_of",
            )


def select(scores: Scores, share: float, scope: str, multiple_of: int = 1) -> Keep:
    """The units that stay when `share` of them goes, smallest scores first, of equals the later ones.

    scope `layer`: the same share of each group; `global`: the smallest of all, heads among heads and neurons among neurons.
    Every group keeps at least its best unit, and the neurons that a group keeps are rounded up to a multiple of `multiple_of`.
    """
    left = {group: len(score) - _round(share * len(score)) for group, score in scores.items()}
    if scope == "global":
        for groups in _by_part(scores).values():
            left |= _global({group: scores[group] for group in groups}, share)
    counts = {}
    for group, score in scores.items():
        rounded = multiple_of if group.attention is None else 1
        counts[group] = _up(max(left[group], 1), rounded, len(score))
    return best(scores, counts)


def best(scores: Scores, counts: Mapping[Group, int]) -> Keep:
    """So many units of each group, those of the largest scores, of equals the earlier ones."""
    order = {group: scores[group].argsort(descending=True, stable=True) for group in counts}
    return {group: sorted(order[group][:count].tolist()) for group, count in counts.items()}


def _part(group: Group) -> str:
    if group.block is None:
        return "layers"
    return "neurons" if group.attention is None else "heads"


def _by_part(groups: Iterable[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(_part(group), []).append(group)
    return found


def _global(scores: Scores, share: float) -> dict[Group, int]:
    """How many units each group keeps when the smallest of all go, the best of each group aside."""
    owners, values = [], []
    for number, score in enumerate(scores.values()):
        others = score.argsort(descending=True, stable=True)[1:]
        owners.append(torch.full_like(others, number))
        values.append(score[others])
    order = torch.cat(values).argsort(stable=True)
    count = _round(share * sum(len(score) for score in scores.values()))
    gone = torch.cat(owners)[order[:count]].bincount(minlength=len(scores))
    return {group: len(score) - int(gone[number]) for number, (group, score) in enumerate(scores.items())}


def cut(bundle: Bundle, target: str, keep: Keep) -> dict[str, Any]:
    """Remove all but `keep` from the model, bring its config in line, and tell what went, for the step's notes."""
    before = sum(parameter.numel() for parameter in bundle.model.parameters())
    removed: dict[str, Any] = {}
    if target == "layers":
        for group, stay in keep.items():
            number = len(surgery.blocks(bundle.model, bundle.family)[group.stack])
            removed[str(group)] = sorted(set(range(number)) - set(stay))
        surgery.keep_layers_of(bundle, {group.stack: stay for group, stay in keep.items()})
    else:
        for group, stay in keep.items():
            removed[str(group)] = _cut_group(bundle, group, stay)
    return {
        "target": target,
        "removed": {name: gone for name, gone in removed.items() if gone},
        "parameters_before": before,
        "parameters_after": sum(parameter.numel() for parameter in bundle.model.parameters()),
        "plain": surgery.sync_config(bundle.model, bundle.family),
    }


def _cut_group(bundle: Bundle, group: Group, stay: list[int]) -> list[int] | int:
    """Original numbers of the heads, or the number of neurons, that went."""
    assert group.block is not None
    model, family = bundle.model, bundle.family
    row, block = surgery.stacks(model, family)[group.stack], surgery.blocks(model, family)[group.stack][group.block]
    if group.attention is None:
        size = surgery.weight_2d(surgery.mlp_linears(block, row)[1]).shape[1]
        surgery.keep_neurons(model, family, group.stack, group.block, stay)
        return size - len(stay)
    had = surgery.kept_heads(block, row.attention[group.attention])
    surgery.keep_heads(model, family, group.stack, group.block, group.attention, stay)
    return sorted(set(had) - {had[i] for i in stay})


@torch.no_grad()
def silence(bundle: Bundle, gone: Mapping[Group, Tensor]) -> None:
    """Zero what reads the units marked in `gone` ([units] bool): for the outputs they are removed."""
    for group, units in gone.items():
        for reader, size in readers(bundle, group):
            columns = surgery.weight_2d(reader)
            columns.masked_fill_(units.to(columns.device).repeat_interleave(size), 0.0)


def _round(number: float) -> int:
    return int(number + 0.5)


def _up(count: int, multiple: int, most: int) -> int:
    return min(math.ceil(count / multiple) * multiple, most)
