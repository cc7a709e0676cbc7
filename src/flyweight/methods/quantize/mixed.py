"""Bits of every layer under a budget: the mix that fits at the least summed error.

Choosing one of several widths for every layer so that their cost stays within a budget is a multiple-choice knapsack
(Kellerer, Pferschy and Pisinger 2004, Knapsack Problems, chapter 11); the recursion over layers and cost solves it exactly:

    best(l, c) = min over choices k of layer l of  best(l - 1, c - cost(l, k)) + error(l, k)

A layer's error is how far it alone, rounded to nearest, moves the output of its block (`sensitivity.py`). Errors are taken to
add up.

Outlier channels of static activations are found later, when the bits are given out: every layer is given room for some, and
`Work.room` tells whoever finds them how much is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import nn

from flyweight.calibration import walk
from flyweight.errors import StepError
from flyweight.methods.quantize.kept import Kept
from flyweight.methods.quantize.sensitivity import TEXTS, chosen, moved
from flyweight.methods.quantize.solving import texts
from flyweight.methods.quantize.work import stored_bits, widest

if TYPE_CHECKING:
    from flyweight.methods.quantize.work import Target, Work
    from flyweight.settings import QuantizeSettings

__all__ = ["Choice", "account", "allocate", "choose_bits", "outlier_bits", "reserve", "widths"]

CELLS = 1 << 16  # a table of costs has at most so many columns
RESERVED = 8  # outlier channels that a linear is given room for, where they take at most half of what can be given out
SMOOTHED = ("nearest", "gptq")  # methods that smooth static inputs and leave channels out


class Choice(NamedTuple):
    """One width of a layer. cost_bits: what it takes on disk, scales included; error: at least 0."""

    bits: int
    cost_bits: int
    error: float


def allocate(choices: Mapping[str, Sequence[Choice]], budget_bits: int) -> dict[str, int]:
    """{layer: bits} with the least sum of errors among all that cost at most `budget_bits` together.

    Exact where what is left above the cheapest mix has at most CELLS different costs (multiples of the common divisor of all
    cost differences). Beyond that costs are rounded up to CELLS steps: the budget holds, the sum is the least up to them.

    Raises ValueError where even the cheapest mix costs more.
    """
    kept = {layer: _undominated(options) for layer, options in choices.items()}
    spare = budget_bits - sum(options[0].cost_bits for options in kept.values())
    if spare < 0:
        raise ValueError(f"{budget_bits} bits are {-spare} fewer than the cheapest choices take")
    extra = {layer: [one.cost_bits - options[0].cost_bits for one in options] for layer, options in kept.items()}
    spare = min(spare, sum(costs[-1] for costs in extra.values()))
    unit = math.gcd(*(cost for costs in extra.values() for cost in costs)) or 1
    unit = max(unit, -(-spare // CELLS))
    cells = spare // unit
    best, picks = np.zeros(cells + 1), []  # best[c]: the least error so far within c units
    for layer, options in kept.items():
        least, pick = np.full(cells + 1, np.inf), np.zeros(cells + 1, np.int8)
        for number, (option, cost) in enumerate(zip(options, extra[layer], strict=True)):
            need = -(-cost // unit)
            if need > cells:
                continue
            tried = best[: cells + 1 - need] + option.error
            better = tried < least[need:]
            least[need:][better] = tried[better]
            pick[need:][better] = number
        best = least
        picks.append(pick)
    found, left = {}, cells
    for layer, pick in zip(reversed(kept), reversed(picks), strict=True):
        number = int(pick[left])
        found[layer] = kept[layer][number].bits
        left -= -(-extra[layer][number] // unit)
    return {layer: found[layer] for layer in choices}


def _undominated(options: Sequence[Choice]) -> list[Choice]:
    """By rising cost; what costs as much as another or more without a smaller error is left out."""
    kept: list[Choice] = []
    for option in sorted(options, key=lambda one: (one.cost_bits, one.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    return kept


def choose_bits(work: Work) -> None:
    """Give every linear of the blocks its own bits, so that they take `settings.bits_per_weight` on average, scales included, or
    all weights of the model `settings.max_megabytes`. What is left then is `work.room`.

    Raises StepError where the budget lies below the least possible (said), and without texts to look at.
    """
    targets = {target.module: target for target in work.of("block")}
    if not targets:
        return
    weights = sum(work.weight(target).numel() for target in targets.values())
    costs = {
        name: {bits: cost(work, target, bits) for bits in widths(work.settings)} for name, target in targets.items()
    }
    least = sum(min(each.values()) for each in costs.values())
    budget = _budget(work, weights, least)
    for channels in range(min(RESERVED, work.settings.outliers), -1, -1):
        reserved = sum(reserve(work, target, channels) for target in targets.values())
        if 2 * reserved <= budget - least:
            break
    work.reserved = channels
    errors = layer_errors(work)
    choices = {
        name: [Choice(bits, costs[name][bits], errors[name][bits]) for bits in widths(work.settings)]
        for name in targets
        if name in errors
    }
    chosen = allocate(choices, budget - reserved)
    for name, bits in chosen.items():
        work.targets[name] = targets[name]._replace(grid=targets[name].grid._replace(bits=bits))
    used = sum(costs[name][bits] for name, bits in chosen.items()) + reserved
    work.room = budget - used
    rows = [{"layer": name, "bits": bits, "error": round(errors[name][bits], 8)} for name, bits in chosen.items()]
    work.notes["mixed"] = {
        "budget": round(budget / weights, 4),
        "bits_per_weight": round(used / weights, 4),
        "outliers_reserved": channels if reserved else 0,
        "layers": rows,
    }


def account(work: Work) -> None:
    """Note in `mixed` what is taken in the end, and, with a warning, by how many bytes the gate broke the budget."""
    mean, megabytes = work.settings.bits_per_weight, work.settings.max_megabytes
    targets = work.of("block")
    if not targets:
        return
    sizes = {target.parameter: work.weight(target).numel() for target in targets}
    weights, used = sum(sizes.values()), _taken(work, sizes)
    note = work.notes["mixed"]
    note["bits_per_weight"] = round(used / weights, 4)
    if mean is not None:
        over = used - int(mean * weights)
        told = f"the linears of the blocks take {used / weights:.4f} bits a weight, more than bits_per_weight {mean:g}"
    else:
        assert megabytes is not None
        whole = _taken(work, {name: value.numel() for name, value in work.bundle.model.named_parameters()})
        over = whole - int(8e6 * megabytes)
        note |= {"megabytes": round(whole / 8e6, 4), "max_megabytes": megabytes}
        told = f"the weights take {whole / 8e6:.4f} MB, more than max_megabytes {megabytes:g}"
    if over > 0:
        note["over_budget"] = math.ceil(over / 8)
        first = ": the acceptance rule came first" if _fell_back(work.notes) else ""
        work.context.progress.note(f"warning: {told}{first}")


def _fell_back(notes: Mapping[str, Any]) -> bool:
    """Whether the gate, by the step's notes, gave a layer more bits than it had."""
    layers = notes.get("gate", {}).get("layers", ())
    return any(row["became"] != "kept" for row in layers)


def _taken(work: Work, sizes: Mapping[str, int]) -> int:
    """Bits that parameters, {name: weights}, take now: their codes, or 32 a weight in float."""
    codes = {name: work.codes[name] for name in sizes if name in work.codes}
    return stored_bits(codes) + 32 * sum(size for name, size in sizes.items() if name not in codes)


def _budget(work: Work, weights: int, least: int) -> int:
    """Bits that the linears of the blocks may take, scales included. Raises StepError where that is less than `least`."""
    mean, megabytes = work.settings.bits_per_weight, work.settings.max_megabytes
    narrow = "raise it, or let more weights share a scale (a larger group_size, granularity channel)"
    if mean is not None:
        if mean * weights < least:
            wanted = f"{math.ceil(1000 * least / weights) / 1000:g} (all layers at 2 bits, scales included)"
            raise StepError(f"bits_per_weight of at least {wanted}", f"{mean:g}", narrow)
        return int(mean * weights)
    assert megabytes is not None
    others = sum(cost(work, target, target.grid.bits) for part in ("table", "head") for target in work.of(part))
    rounded = {target.parameter for target in work.targets.values()}
    floats = sum(32 * value.numel() for name, value in work.bundle.model.named_parameters() if name not in rounded)
    left = int(8e6 * megabytes) - others - floats
    if left < least:
        wanted = (
            f"{math.ceil((others + floats + least) / 8e3) / 1e3:g} (all layers at 2 bits, tables as they are asked for)"
        )
        raise StepError(
            f"max_megabytes of at least {wanted}", f"{megabytes:g}", f"{narrow}, or fewer bits of embeddings"
        )
    return left


def widths(settings: QuantizeSettings) -> tuple[int, ...]:
    """The bits that a layer may get: 2, 3, 4 and 8, or 7 where integer kernels saturate."""
    return 2, 3, 4, widest(settings)


def cost(work: Work, target: Target, bits: int) -> int:
    """Bits that the layer takes in `bits` a weight, at most: codes, scales, zero-points, the channel scales of AWQ and smoothing,
    the grid and the shift of static inputs. Outlier channels are not known yet: see `reserve`.
    """
    weight = work.weight(target)
    rows, inputs = weight.shape
    grid = target.grid
    scales = {"tensor": 1, "channel": rows, "group": weight.numel() // (grid.group_size or 1)}[grid.granularity]
    total = weight.numel() * bits + scales * (32 + (8 if grid.scheme == "asymmetric" else 0))
    if target.part != "block":
        return total
    settings, static = work.settings, work.settings.activations == "static"
    if settings.method == "awq" or (static and settings.smooth and settings.method in SMOOTHED):
        total += 32 * inputs
    if static:
        shifted = settings.smooth and isinstance(target.owner.bias, nn.Parameter)  # only a bias can make up for a shift
        total += 32 + 8 + (32 * inputs if shifted else 0)
    return total


def outlier_bits(target: Target, count: int, work: Work) -> int:
    """Bits that `count` outlier channels of the layer take: where they are, and their weights in float."""
    return count * (64 + 32 * len(work.weight(target)))


def reserve(work: Work, target: Target, channels: int | None = None) -> int:
    """Bits of the budget kept for outlier channels of the layer: so many, by default those noted, or all it can have if fewer."""
    settings = work.settings
    if settings.activations != "static" or settings.method not in SMOOTHED or target.grid.scheme == "binary":
        return 0
    kept = work.reserved if channels is None else channels
    return outlier_bits(target, min(kept, settings.outliers, work.weight(target).shape[1] // 4), work)


def layer_errors(work: Work) -> dict[str, dict[int, float]]:
    """{layer: {bits: error}} for the linears of the blocks, each rounded alone, see `sensitivity`. Raises StorageError.

    A run that was killed goes on after the last block that was done.
    """
    found: dict[str, dict[int, float]] = {}
    every = texts(work)
    few = every.take(chosen(len(every), TEXTS, work.context.seed))
    for block in walk(work.bundle, few, work.context.progress, "errors by bits", wanted=True):
        kept = Kept(work, "errors", block)
        if kept.state is None:
            here = {
                target.module: {
                    bits: moved(work, block, {target.module: work.rounded(target, target.grid._replace(bits=bits))})
                    for bits in widths(work.settings)
                }
                for site in block.sites
                for target in work.at(site)
            }
            kept.keep({"errors": here})
        else:
            here = kept.state["errors"]
        found |= here
    return found
