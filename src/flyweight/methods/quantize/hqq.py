"""HQQ: zero-points that fit most weights well and leave outliers to err, found without data (Badri and Shaji 2023).

For everything that shares a scale s, in units of s (w the weights, q = clamp(round(w + z)), so that nothing depends on how
large weights are), the zero-point z minimizes sum |w - (q - z)|^p, p = 0.7, by half-quadratic splitting:

    e = shrink(w - (q - z), beta),   shrink(x, beta) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    z = mean(q - (w - e)),           beta = 1.01 beta from 10 on, 20 rounds

MatMulNBits and others want a zero-point that is a code, so z is then rounded, s fitted by least squares to the integers found
(s = <w, n> / <n, n>) and the weights are rounded once more. Out of this grid and the one from the extremes each scale's own
better one is kept, by the same sum in the weights' units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flyweight.methods.quantize.grid import Grid, codes_at, limits, scales_of, units
from flyweight.models.codes import dequantize, expand

if TYPE_CHECKING:
    from flyweight.methods.quantize.work import Work
    from flyweight.models.bundle import Codes

__all__ = ["P", "fitted", "hqq", "shrink", "zero_points"]

P = 0.7
BETA, KAPPA, ROUNDS = 10.0, 1.01, 20


def hqq(work: Work) -> None:
    """Put codes for all linears of the blocks."""
    targets = work.of("block")
    for target in work.context.progress.track(targets, "fitting zero-points", total=len(targets)):
        work.put(
            target,
            fitted(work.weight(target), target.grid, work.mask(target), target.transposed),
        )


def fitted(weight: Tensor, grid: Grid, mask: Tensor | None = None, transposed: bool = False) -> Codes:
    """Codes of weight [out, in] on an asymmetric grid, for no scale worse in sum |w - its value|^p than rounding to nearest."""
    scale, zero_point = scales_of(weight, grid)
    assert zero_point is not None, "the settings refuse other grids"
    steps = units(weight, grid) / scale.reshape(-1, 1)
    kept = torch.ones_like(steps) if mask is None else units(mask, grid).to(steps.dtype)
    top = limits(grid)[1]
    zeros = zero_points(steps, zero_point.reshape(-1, 1).float(), kept, top).round().clamp(0, top)
    integers = ((steps.round() + zeros).clamp(0, top) - zeros) * kept
    square = (integers**2).sum(1, keepdim=True)
    share = (steps * integers).sum(1, keepdim=True) / square.clamp(min=1)
    share = torch.where((square > 0) & (share > 0), share, torch.ones_like(share))  # a unit of zeros keeps its scale
    found = scale * share.reshape(scale.shape), zeros.reshape(scale.shape).to(torch.uint8)

    def harm(scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = codes_at(weight / expand(scale, grid), grid, scale, zero_point, mask)
        return (units(dequantize(codes) - weight, grid).abs() ** P).sum(1).reshape(scale.shape)

    better = harm(*found) < harm(scale, zero_point)
    scale, zero_point = torch.where(better, found[0], scale), torch.where(better, found[1], zero_point)
    return codes_at(weight / expand(scale, grid), grid, scale, zero_point, mask, transposed)


def zero_points(steps: Tensor, start: Tensor, kept: Tensor, top: int) -> Tensor:
    """z [scales, 1], real numbers, for weights in steps [scales, n]; kept: 1, or 0 where pruned."""
    count = kept.sum(1, keepdim=True).clamp(min=1)
    zeros, beta = start, BETA
    for _ in range(ROUNDS):
        codes = (steps + zeros).round().clamp(0, top)
        spare = shrink(steps - (codes - zeros), beta)
        zeros = ((codes - (steps - spare)) * kept).sum(1, keepdim=True) / count
        beta *= KAPPA
    return zeros


def shrink(value: Tensor, beta: float) -> Tensor:
    """The generalized soft threshold for |x|^p (Badri and Shaji 2023; Badri and Yahia 2016)."""
    size = value.abs()
    return value.sign() * (size - size.clamp(min=1e-12) ** (P - 1) / beta).clamp(min=0)
