"""GPTQ: weights are rounded column by column, and those not yet rounded make up for the error (Frantar et al. 2022).

With the Hessian H = 2 X X^T of a layer's squared output error and U = the upper Cholesky factor of H^-1 (H^-1 = U^T U), for
every column j in turn (section 3.3, algorithm 1):

    q_j = the grid point nearest to w_j          e = (w_j - q_j) / U_jj          w_k -= e U_jk  for all k > j

Columns come in falling order of H_jj ("act-order"), the scales of all groups are fixed beforehand by the uncorrected weights,
so that the order leaves no trace on disk. Each scale is the one, out of cut-offs of the range, that costs least in
sum (w_j - q_j)^2 / U_jj^2, which is the loss that the columns add up to (section 3.1, eq. 2). Inputs that are always zero are
rounded plainly. A pruned weight's only grid point is zero: its share of the corrections is passed on (SparseGPT, Frantar and
Alistarh 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flyweight.calibration import Site, calibrate
from flyweight.hessian import Factor, Moments, factor, sweep
from flyweight.methods.quantize.grid import Grid, codes_at, limits, units
from flyweight.methods.quantize.solving import cut_scales, error, note, texts
from flyweight.models.codes import expand

if TYPE_CHECKING:
    from flyweight.methods.quantize.work import Target, Work
    from flyweight.models.bundle import Codes

__all__ = ["Factor", "Solver", "corrected", "factor", "gptq", "solved"]

COLUMNS = 32
"""Columns corrected one by one before the rest is corrected at once."""


def gptq(work: Work) -> None:
    """Put codes for all linears of the blocks.

    Raises StepError: no texts, NaN or inf in activations, a Hessian that no damping makes positive definite (layer named).
    """
    calibrate(work.bundle, texts(work), Solver(work), work.context.progress)


class Solver:
    """For `calibration.calibrate`; linears of a site share one Hessian."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def make(self, site: Site) -> Moments:
        return Moments.of(site, self.work.bundle.device)

    def accumulate(self, state: Moments, inputs: Tensor) -> None:
        state.add(inputs)

    def solve(self, site: Site, state: Any) -> None:
        targets = self.work.at(site)
        if not targets:
            return
        gram = state.gram(site.name)
        made = factor(gram, self.work.settings.damping, site.name)
        if made.damping > self.work.settings.damping:
            self.work.notes.setdefault("damping", {})[site.name] = made.damping
        for target in targets:
            weight, near = self.work.weight(target), self.work.rounded(target)
            codes = solved(self.work, target, made)[0]
            note(self.work, target, error(near, weight, gram), error(codes, weight, gram))
            self.work.put(target, codes)


def solved(work: Work, target: Target, made: Factor, weight: Tensor | None = None) -> tuple[Codes, Tensor]:
    """(codes of one linear, the corrected weight [out, in] whose rounding they are). weight: in place of its own, [out, in]."""
    weight = work.weight(target) if weight is None else weight
    mask, grid = work.mask(target), target.grid
    precision = torch.empty_like(made.upper[0]).scatter_(0, made.order, made.upper.diagonal() ** -2)

    def cost(difference: Tensor) -> Tensor:
        return units(difference**2 * precision.float(), grid).sum(1, keepdim=True)

    scale, zero_point = cut_scales(weight, grid, mask, cost)
    steps = corrected(weight, grid, scale, zero_point, mask, made)
    codes = codes_at(steps, grid, scale, zero_point, mask, target.transposed)
    return codes, steps * expand(scale, grid)


def corrected(
    weight: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None, mask: Tensor | None, made: Factor
) -> Tensor:
    """[out, in] float32: every weight as it stood when its turn came, in units of its scale; rounding it gives the code."""
    order, upper = made.order, made.upper
    low, high = limits(grid)

    def lines(part: Tensor, dtype: torch.dtype) -> Tensor:
        """[in, out] in order: a column is then contiguous"""
        return part.expand_as(weight).t()[order].to(dtype)

    left, scales = lines(weight, upper.dtype), lines(expand(scale, grid), upper.dtype)
    zeros = None if zero_point is None else lines(expand(zero_point, grid), torch.float32)
    kept = None if mask is None else lines(mask, upper.dtype)
    steps = torch.empty_like(left, dtype=torch.float32)

    def settle(j: int) -> Tensor:
        steps[j] = left[j] / scales[j]
        zero = 0 if zeros is None else zeros[j]
        points = ((steps[j].round() + zero).clamp(low, high) - zero) * scales[j]
        return points if kept is None else points * kept[j]

    sweep(left, upper, settle, COLUMNS)
    return torch.empty_like(steps).index_copy_(0, order, steps).t()
