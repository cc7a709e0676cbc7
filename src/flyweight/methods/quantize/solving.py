"""What the solvers of weights share: errors of a linear's output (see `flyweight.hessian`), scales that cut off the extremes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.hessian import Moments, lost, relative
from flyweight.methods.quantize.grid import Grid, codes_at, scales_of
from flyweight.models.codes import dequantize, expand

if TYPE_CHECKING:
    from flyweight.methods.quantize.work import Target, Work
    from flyweight.models.bundle import Codes

__all__ = ["SHARES", "Moments", "cut_scales", "error", "gram_cost", "lost", "note", "texts"]

SHARES = tuple(1 - step / 20 for step in range(11))
"""Shares of the range that a grid may cover, 1 to 0.5."""


def texts(work: Work) -> Examples:
    """The calibration texts. Raises StepError for none."""
    if work.context.calibration is None:
        raise StepError("texts to calibrate on", "none", "give --calibrate F or --train F")
    return work.context.calibration


def error(codes: Codes, weight: Tensor, gram: Tensor) -> float:
    """Relative error of a linear's output: the root of what is lost over what there is."""
    return relative(dequantize(codes) - weight, weight, gram)


def note(work: Work, target: Target, nearest: float, now: float) -> None:
    """Put down the relative error of the layer's output by rounding to nearest and by what is put, on the same inputs."""
    found = {"nearest": round(nearest, 6), "now": round(now, 6)}
    work.notes.setdefault("output_error", {})[target.module] = found


Cost = Callable[[Tensor], Tensor]
"""[out, in] of lost weights -> [scales, 1]: the cost to everything that shares a scale."""


def gram_cost(gram: Tensor, grid: Grid) -> Cost:
    """Mean squared output error that each unit makes by itself: tr(D G D^T) over the inputs of a group, a row or all."""
    width = gram.shape[0]
    size = grid.group_size if grid.granularity == "group" and grid.group_size else width
    parts = gram.reshape(width // size, size, width // size, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).float()

    def cost(difference: Tensor) -> Tensor:
        groups = difference.reshape(len(difference), -1, size).transpose(0, 1)  # [groups, out, size]
        found = (torch.bmm(groups, parts) * groups).sum(-1).t().reshape(-1, 1)
        return found.sum(0, keepdim=True) if grid.granularity == "tensor" else found

    return cost


def cut_scales(weight: Tensor, grid: Grid, mask: Tensor | None, cost: Cost) -> tuple[Tensor, Tensor | None]:
    """(scale, zero-point): for each unit the share of its range, out of SHARES, whose rounding costs least."""
    best: Tensor | None = None
    shares = torch.ones(0)
    for share in SHARES:
        scale, zero_point = scales_of(weight, grid, share)
        codes = codes_at(weight / expand(scale, grid), grid, scale, zero_point, mask)
        found = cost(dequantize(codes) - weight)
        if best is None:
            best, shares = found, torch.full_like(found, share)
        better = found < best
        best, shares = torch.where(better, found, best), torch.where(better, share, shares)
    return scales_of(weight, grid, shares)
