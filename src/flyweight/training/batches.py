"""Which examples form a batch, and a batch as tensors."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flyweight.data import Examples

__all__ = ["by_length", "grouped", "share", "tensors"]

Indices = NDArray[np.int64]
POOL = 50
"""Batches that are sorted by length together: more means less padding and less chance."""


def grouped(lengths: NDArray[np.int64], size: int, seed: int, epoch: int) -> list[Indices]:
    """One epoch of batches of like length, a pure function of (lengths, size, seed, epoch).

    Shuffle, cut into pools of `POOL` batches, sort each pool by length, cut it into batches, shuffle the batches.
    Every example occurs exactly once; there are ceil(n / size) batches.
    """
    chance = np.random.default_rng([seed, epoch])
    order = chance.permutation(len(lengths))
    found: list[Indices] = []
    for start in range(0, len(order), size * POOL):
        pool = order[start : start + size * POOL]
        pool = pool[np.argsort(-lengths[pool], kind="stable")]
        found += [pool[i : i + size] for i in range(0, len(pool), size)]
    return [found[i] for i in chance.permutation(len(found))]


def by_length(lengths: NDArray[np.int64], size: int) -> list[Indices]:
    """Batches from the longest example to the shortest: least padding, and too little memory shows at once."""
    order = np.argsort(-lengths, kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def share(batch: Indices, rank: int, world: int) -> tuple[Indices, float]:
    """What process `rank` of `world` computes of a batch, and the weight of its mean loss.

    The mean over processes of weight x loss is the mean over the whole batch, also when it does not divide. A process
    without a share computes one example with weight 0, so that all take part in the exchange of gradients.
    """
    if world == 1:
        return batch, 1.0
    mine = batch[rank::world]
    return (mine, len(mine) * world / len(batch)) if len(mine) else (batch[:1], 0.0)


def tensors(data: Examples, indices: Indices, pad: int, device: torch.device) -> dict[str, Tensor]:
    """input_ids, attention_mask, token_type_ids [batch, longest] int64 and, where there are any, labels [batch]."""
    batch = {name: torch.from_numpy(array).to(device) for name, array in data.batch(indices, pad).items()}
    if data.labels is not None:
        batch["labels"] = torch.from_numpy(np.ascontiguousarray(data.labels[indices])).to(device)
    return batch
