"""Quantiles of repeated timings with intervals that assume nothing of their distribution."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numpy.typing import ArrayLike

from flyweight.artifact import Measurement

__all__ = ["order_ranks", "quantile"]

CONFIDENCE = 0.95


@cache
def order_ranks(n: int, share: float) -> tuple[int | None, int | None]:
    """Ranks (from 0) of the sorted sample that hold the `share` quantile between them with 95 % confidence.

    The number of samples below the quantile is Binomial(n, share); each side leaves out at most 2.5 % (David and
    Nagaraja 2003, section 7.1). A side is None where the sample is too small to bound it: p99 needs 368 samples.
    """
    tail = (1 - CONFIDENCE) / 2
    logs = math.log(share), math.log1p(-share)
    choose = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(n + 1)]
    chance = [math.exp(c + k * logs[0] + (n - k) * logs[1]) for k, c in enumerate(choose)]
    below, low = 0.0, None
    for k in range(n):  # the k-th smallest lies above the quantile exactly when at most k samples are below it
        below += chance[k]
        if below > tail:
            break
        low = k
    above, high = 0.0, None
    for k in range(n, 0, -1):
        above += chance[k]
        if above > tail:
            break
        high = k - 1
    return low, high


def quantile(samples: ArrayLike, share: float, unit: str, method: str) -> Measurement:
    """The quantile (linear interpolation) with its order-statistic interval; `method` says how samples were taken."""
    ordered = np.sort(np.asarray(samples, dtype=float))
    low, high = order_ranks(len(ordered), share)
    value = float(np.quantile(ordered, share))
    return Measurement(
        value=value,
        unit=unit,
        low=None if low is None else float(ordered[low]),
        high=None if high is None else float(ordered[high]),
        n=len(ordered),
        method=f"{method}; 95 % interval from order statistics",
    )
