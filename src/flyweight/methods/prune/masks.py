"""Which weights go: pure functions over weights seen as [out, in].

A mask is True where a weight stays. Weights that are zero already go first, so that pruning twice composes and a share
always counts all zeros.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flyweight.settings import PruneSettings

__all__ = ["RAMP", "cubic_share", "is_two_of_four", "masks", "two_of_four"]

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

    weights: {name: [out, in]}; for `pattern: 2:4` with `in` divisible by four
    share:   of the weights to remove, exactly round(share * n); None with a threshold or a whole 2:4 pattern
    """
    scores = _scores(weights, settings, seed)
    if settings.threshold is not None:
        return {name: weight.abs() >= settings.threshold for name, weight in weights.items()}
    if settings.pattern == "2:4":
        kept = {name: two_of_four(score) for name, score in scores.items()}
        if share is None or share >= 0.5:
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


def two_of_four(scores: Tensor) -> Tensor:
    """True for the two largest of every four along the input; [out, in] -> [out, in]. Of equals the first."""
    groups = scores.reshape(scores.shape[0], -1, 4)
    order = groups.argsort(dim=-1, descending=True, stable=True)[..., :2]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).view_as(scores)


def is_two_of_four(weight: Tensor) -> bool:
    """Whether at most two of every four along the input are not zero."""
    if weight.shape[1] % 4:
        return False
    return bool(((weight != 0).reshape(weight.shape[0], -1, 4).sum(-1) <= 2).all())


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
    flat = scores.flatten()
    count = int(share * flat.numel() + 0.5)
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    limit = flat.kthvalue(count).values
    gone = flat < limit
    equals = (flat == limit).nonzero()[: count - int(gone.sum()), 0]
    gone[equals] = True
    return ~gone.view_as(scores)
