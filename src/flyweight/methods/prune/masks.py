"""Which weights go: pure functions over weights seen as [out, in].

A mask is True where a weight stays. Weights that are zero already go first, so that pruning twice composes and a share
always counts all zeros.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from flyweight.errors import StepError
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings

__all__ = [
    "RAMP",
    "check",
    "counts",
    "cubic_share",
    "fitting",
    "is_n_of_m",
    "is_two_of_four",
    "masks",
    "n_and_m",
    "n_of_m",
    "row_wise",
    "smallest",
    "stored_as",
    "two_of_four",
    "views",
]

RAMP = 0.75
"""Share of the steps in which the cubic schedule rises; in the rest the model recovers."""


def cubic_share(step: int, total: int, amount: float) -> float:
    """Share to remove after `step` of `total` steps: amount * (1 - (1 - t)^3) with t = step / (RAMP * total), at most 1.

    Zhu and Gupta 2017, eq. 1, from nothing at step 0.
    """
    t = min(1.0, step / max(RAMP * total, 1.0))
    return amount * (1.0 - (1.0 - t) ** 3)


def masks(weights: Mapping[str, Tensor], settings: PruneSettings, share: float | None, seed: int) -> dict[str, Tensor]:
    """What stays of every weight.

    weights: {name: [out, in]}; for `pattern: N:M` with `in` divisible by M
    share:   of the weights to remove, exactly round(share * n); None with a threshold or a whole pattern
    """
    scores = _scores(weights, settings, seed)
    if settings.threshold is not None:
        return {name: weight.abs() >= settings.threshold for name, weight in weights.items()}
    if (pattern := n_and_m(settings.pattern)) is not None:
        kept = {name: n_of_m(score, *pattern) for name, score in scores.items()}
        if share is None or share >= 1 - pattern[0] / pattern[1]:
            return kept
        scores = {name: score.masked_fill(kept[name], torch.inf) for name, score in scores.items()}
    assert share is not None
    if settings.scope == "layer":
        return {name: _largest(score, share) for name, score in scores.items()}
    flat = _largest(torch.cat([score.flatten() for score in scores.values()]), share)
    found, start = {}, 0
    for name, score in scores.items():
        found[name] = flat[start : start + score.numel()].view_as(score)
        start += score.numel()
    return found


def n_and_m(pattern: str) -> tuple[int, int] | None:
    """`2:4` -> (2, 4): 2 of every 4 stay. None for `unstructured`."""
    if pattern == "unstructured":
        return None
    kept, of = pattern.split(":")
    return int(kept), int(of)


def n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """True for the n largest of every m along the input; [out, in] -> [out, in], m divides `in`. Of equals the first."""
    groups = scores.reshape(scores.shape[0], -1, m)
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).view_as(scores)


def is_n_of_m(weight: Tensor, n: int, m: int) -> bool:
    """Whether at most n of every m along the input are not zero."""
    if weight.shape[1] % m:
        return False
    return bool(((weight != 0).reshape(weight.shape[0], -1, m).sum(-1) <= n).all())


def two_of_four(scores: Tensor) -> Tensor:
    """True for the two largest of every four along the input; [out, in] -> [out, in]. Of equals the first."""
    return n_of_m(scores, 2, 4)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four along the input are not zero."""
    return is_n_of_m(weight, 2, 4)


def stored_as(pattern: str) -> str:
    """The pattern that `bundle.sparse` takes: 2:4 is one on disk, any other is a bitmask."""
    return "2:4" if pattern == "2:4" else "unstructured"


def fitting(widths: Mapping[str, int], pattern: str) -> tuple[list[str], list[str]]:
    """(names of weights that the pattern fits, those that are left out), by how many inputs they have.

    Raises StepError where it fits none.
    """
    parts = n_and_m(pattern)
    fits = [name for name, width in widths.items() if parts is None or width % parts[1] == 0]
    if widths and not fits:
        assert parts is not None
        first = next(iter(widths))
        raise StepError(
            f"weights with a multiple of {parts[1]} inputs for the pattern {pattern}",
            f"none, {widths[first]} in {first}",
            "set pattern to unstructured",
        )
    return fits, [name for name in widths if name not in set(fits)]


def views(bundle: Bundle, names: Collection[str]) -> dict[str, Tensor]:
    """{name: [out, in]} of those parameters of the blocks' linears, in order; what is changed in place reaches the model."""
    linears = surgery.linears(bundle.model, bundle.family)
    return {
        f"{name}.weight": surgery.weight_2d(module).detach()
        for name, module in linears.items()
        if f"{name}.weight" in names
    }


def check(weights: Mapping[str, Tensor], share: float | None, pattern: str) -> None:
    """Before a layer-wise solver sets to work. Raises StepError, naming the weight: NaN or inf in it, inputs that the pattern
    does not divide, a share that comes to nothing or to everything."""
    parts = n_and_m(pattern)
    for name, weight in weights.items():
        number, width = weight.numel(), weight.shape[1]
        if not torch.isfinite(weight).all():
            raise StepError(
                f"finite weights in {name}", "NaN or inf", "start from a model whose training did not diverge"
            )
        if parts is not None and width % parts[1]:
            raise StepError(f"inputs of {name} in multiples of {parts[1]} for {pattern}", f"{width}", "leave it out")
        if parts is None and (share is None or not 0 < counts(number, share) < number):
            raise StepError(
                f"an amount that removes some of the {number} weights of {name} and leaves some",
                f"{share}",
                "raise it" if share is None or share < 0.5 else "lower it",
            )


def counts(number: int, share: float) -> int:
    """How many of `number` a share is: rounded, a half upwards."""
    return int(share * number + 0.5)


def row_wise(scores: Tensor, share: float) -> Tensor:
    """False for the smallest of each row, the same number of them but for one, exactly round(share * n) in all."""
    rows, width = scores.shape
    upto = torch.tensor([counts((row + 1) * width, share) for row in range(rows)], device=scores.device)
    gone = torch.diff(upto, prepend=upto.new_zeros(1))
    ranks = scores.argsort(dim=1, stable=True).argsort(dim=1)
    return ranks >= gone[:, None]


def _scores(weights: Mapping[str, Tensor], settings: PruneSettings, seed: int) -> dict[str, Tensor]:
    if settings.criterion == "magnitude":
        return {name: weight.detach().abs() for name, weight in weights.items()}
    chance = torch.Generator().manual_seed(seed)
    found = {}
    for name, weight in weights.items():
        random = torch.rand(weight.shape, generator=chance).to(weight.device)
        found[name] = random.masked_fill(weight == 0, -1.0)
    return found


def _largest(scores: Tensor, share: float) -> Tensor:
    """False for exactly round(share * n) of the smallest; of equals the first go."""
    return ~smallest(scores, counts(scores.numel(), share))


def smallest(scores: Tensor, count: int) -> Tensor:
    """True for exactly `count` of the smallest; of equals the first."""
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = flat.kthvalue(count).values
    found = flat < limit
    equals = (flat == limit).nonzero()[: count - int(found.sum()), 0]
    found[equals] = True
    return found.view_as(scores)
