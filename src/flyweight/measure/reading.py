"""In what portions texts are read, counted: the batches are those that will be made, padding included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flyweight.calibration import BATCH
from flyweight.measure.work import Work
from flyweight.training.batches import by_length, grouped

__all__ = ["Lengths", "Read", "in_order", "predicted", "trained", "walked"]

Lengths = NDArray[np.int64]
"""Tokens of every text."""


class Read(NamedTuple):
    """Of texts. batches: that a model is called with; tokens: in all of them, padding included; largest: in one"""

    batches: float = 0.0
    tokens: float = 0.0
    largest: int = 0

    @property
    def forward(self) -> Work:
        return Work(passes=self.batches, tokens=self.tokens)

    @property
    def gated(self) -> Work:
        """There and back to gates: what weights cost besides their tokens comes twice."""
        return Work(passes=2 * self.batches, gated=self.tokens)

    @property
    def backward(self) -> Work:
        """There and back to all weights."""
        return Work(self.batches, self.tokens, self.batches, self.tokens)


def walked(lengths: Lengths) -> Read:
    """By `calibration.walk`: texts of one length together, nothing padded."""
    sizes, counts = np.unique(lengths, return_counts=True)
    batches = sum(math.ceil(count / BATCH) for count in counts)
    largest = max((int(size) * min(int(count), BATCH) for size, count in zip(sizes, counts, strict=True)), default=0)
    return Read(batches, float(lengths.sum()), largest)


def predicted(lengths: Lengths, size: int = 64) -> Read:
    """By `training.predict`."""
    return _padded(lengths, by_length(lengths, size))


def in_order(lengths: Lengths, size: int = 32) -> Read:
    """By `training.accumulate`, in the order in which they stand."""
    return _padded(lengths, [np.arange(i, min(i + size, len(lengths))) for i in range(0, len(lengths), size)])


def trained(lengths: Lengths, size: int, updates: float) -> Read:
    """So many steps of `training.train`; the batches of the first epoch stand for all."""
    if not len(lengths):
        return Read()
    epoch = _padded(lengths, grouped(lengths, size, 0, 0))
    return Read(updates, epoch.tokens / epoch.batches * updates, epoch.largest)


def _padded(lengths: Lengths, batches: Sequence[NDArray[np.int64]]) -> Read:
    sizes = [int(lengths[batch].max()) * len(batch) for batch in batches]
    return Read(len(sizes), float(sum(sizes)), max(sizes, default=0))
