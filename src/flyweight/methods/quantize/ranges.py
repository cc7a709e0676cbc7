"""Where to cut a static activation grid off: pure functions over a sample of values, no model in sight.

A uint8 grid covers [low, high] with low <= 0 <= high: s = (high - low) / 255, z = round(-low / s), and what lies outside
saturates. Cutting off rare large values makes s finer for all others:

minmax      the smallest and the largest value seen
percentile  the values that a share of 1e-4 of the sample lies below and above
mse         min-max times the factor in .3 .. 1 whose grid has the least squared error (Banner et al. 2019, section 3)
entropy     the threshold on |x| whose 8-bit histogram is nearest to the full one in KL divergence (Migacz 2017, TensorRT)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RANGES", "Range", "entropy", "grid_of", "minmax", "mse", "percentile"]

SHARE = 1e-4
FACTORS = torch.linspace(0.3, 1.0, 36)
BINS = 2048


class Range(NamedTuple):
    """low <= 0 <= high"""

    low: float
    high: float


def grid_of(found: Range) -> tuple[Tensor, Tensor]:
    """(scale [1] float32, zero-point [1] uint8) of the uint8 grid over a range; any scale will do for an empty one."""
    scale = torch.tensor([(found.high - found.low) / 255], dtype=torch.float32)
    if float(scale) < torch.finfo(torch.float32).tiny:
        scale = torch.ones(1)
    return scale, (-found.low / scale).round().clamp(0, 255).to(torch.uint8)


def minmax(values: Tensor) -> Range:
    return Range(min(float(values.min()), 0.0), max(float(values.max()), 0.0))


def percentile(values: Tensor) -> Range:
    ordered, n = values.flatten(), values.numel()
    above = max(1, round(n * SHARE))
    low = torch.topk(ordered, above, largest=False).values.max()
    high = torch.topk(ordered, above).values.min()
    return Range(min(float(low), 0.0), max(float(high), 0.0))


def mse(values: Tensor) -> Range:
    """Both ends shrink by one factor; the error is that of the rounded sample, at its bins' centres."""
    low, high = minmax(values)
    counts, centres = _histogram(values)
    best, least = Range(low, high), float("inf")
    for factor in FACTORS.tolist():
        found = Range(low * factor, high * factor)
        scale, zero = grid_of(found)
        rounded = ((centres / scale).round() + zero).clamp(0, 255) - zero
        error = float((counts * (rounded * scale - centres).square()).sum())
        if error < least:
            best, least = found, error
    return best


def entropy(values: Tensor) -> Range:
    """KL(P || Q): P is the histogram of |x| with what is cut off put into its last bin, Q the same in 128 levels."""
    size = values.abs().flatten()
    top = float(size.max())
    low, high = minmax(values)
    if top == 0:
        return Range(low, high)
    counts = torch.histc(size, BINS, 0.0, top).double()
    best, least = top, float("inf")
    for bins in range(128, BINS + 1, 32):
        kept = counts[:bins].clone()
        wanted = kept.clone()
        wanted[-1] += counts[bins:].sum()
        level = torch.arange(bins) * 128 // bins
        some = (kept > 0).double()
        sums = torch.zeros(128, dtype=torch.float64).index_add_(0, level, kept)
        numbers = torch.zeros(128, dtype=torch.float64).index_add_(0, level, some)
        given = some * (sums / numbers.clamp(min=1))[level]
        p, q = wanted / wanted.sum(), given / given.sum().clamp(min=1e-300)
        there = p > 0
        divergence = float((p[there] * (p[there] / q[there].clamp(min=1e-12)).log()).sum())
        if divergence < least:
            best, least = top * bins / BINS, divergence
    return Range(max(low, -best), min(high, best))


RANGES: dict[str, Callable[[Tensor], Range]] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
    "entropy": entropy,
}
"""By the names of the setting."""


def _histogram(values: Tensor) -> tuple[Tensor, Tensor]:
    """(counts, centres) [BINS] between the extremes."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        return torch.tensor([float(values.numel())]), torch.tensor([low])
    counts = torch.histc(values.float().flatten(), BINS, low, high)
    return counts, low + (torch.arange(BINS) + 0.5) * (high - low) / BINS
