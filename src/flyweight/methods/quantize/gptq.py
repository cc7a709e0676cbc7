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

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flyweight.calibration import Site, calibrate
from flyweight.errors import StepError
from flyweight.methods.quantize.grid import Grid, codes_at, limits, units
from flyweight.methods.quantize.solving import Moments, cut_scales, error, note, texts
from flyweight.models.codes import expand

if TYPE_CHECKING:
    from flyweight.methods.quantize.work import Target, Work
    from flyweight.models.bundle import Codes

__all__ = ["Factor", "Solver", "corrected", "factor", "gptq", "solved"]

COLUMNS = 32
"""Columns corrected one by one before the rest is corrected at once."""
TRIES = 4
"""Times that a damping which is too small is made ten times larger."""


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


class Factor(NamedTuple):
    """order: [in], columns by falling H_jj; upper: [in, in], U of the ordered and damped Hessian; damping: the share it took"""

    order: Tensor
    upper: Tensor
    damping: float


def factor(hessian: Tensor, damping: float, name: str) -> Factor:
    """U with H^-1 = U^T U of [in, in] float64, damped by a share of its mean diagonal; a scale of H changes nothing but U's.

    Raises StepError naming the layer where H stays indefinite.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    order = torch.argsort(diagonal, descending=True, stable=True)
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), dtype=hessian.dtype, device=hessian.device)
    for attempt in range(TRIES):
        share = damping * 10**attempt
        damped = hessian + torch.diag(torch.where(dead, mean, mean * share))
        lower, failed = torch.linalg.cholesky_ex(damped[order][:, order])
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(upper).all()):
                return Factor(order, upper, share)
    raise StepError(
        f"a positive definite Hessian of the inputs of {name}",
        f"none up to damping {damping * 10 ** (TRIES - 1):g}",
        "give more or other texts, or a larger damping",
    )


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
    width = weight.shape[1]

    def lines(part: Tensor, dtype: torch.dtype) -> Tensor:
        """[in, out] in order: a column is then contiguous"""
        return part.expand_as(weight).t()[order].to(dtype)

    left, scales = lines(weight, upper.dtype), lines(expand(scale, grid), upper.dtype)
    zeros = None if zero_point is None else lines(expand(zero_point, grid), torch.float32)
    kept = None if mask is None else lines(mask, upper.dtype)
    steps = torch.empty_like(left, dtype=torch.float32)
    shares = upper / upper.diagonal()[:, None]
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        errors = torch.empty_like(left[start:end])
        for j in range(start, end):
            steps[j] = left[j] / scales[j]
            zero = 0 if zeros is None else zeros[j]
            points = ((steps[j].round() + zero).clamp(low, high) - zero) * scales[j]
            errors[j - start] = left[j] - (points if kept is None else points * kept[j])
            left[j + 1 : end].addr_(shares[j, j + 1 : end], errors[j - start], alpha=-1)
        left[end:].addmm_(shares[start:end, end:].t(), errors, alpha=-1)
    return torch.empty_like(steps).index_copy_(0, order, steps).t()
