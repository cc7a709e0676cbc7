"""What the solvers of weights share: moments of a site's inputs, errors of a linear's output, scales that cut off the extremes.

With G = mean of x x^T over all tokens, the mean squared error of a linear's output is tr(D G D^T), D = what the weight lost:
exact for every candidate without looking at the tokens again, in memory that does not grow with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.methods.quantize.grid import Grid, codes_at, scales_of
from flyweight.models.codes import dequantize, expand

if TYPE_CHECKING:
    from flyweight.calibration import Block, Site
    from flyweight.methods.quantize.work import Target, Work
    from flyweight.models.bundle import Codes

__all__ = ["SHARES", "Moments", "cut_scales", "error", "gram_cost", "lost", "note", "texts"]

SHARES = tuple(1 - step / 20 for step in range(11))
"""Shares of the range that a grid may cover, 1 to 0.5."""


@dataclass
class Moments:
    """Of what a site's linears read. total: sum of x x^T [in, in] float64; sizes: sum of |x| [in] float64; tokens: how many"""

    total: Tensor
    sizes: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, site: Site, device: torch.device) -> Moments:
        width = site.width
        return cls(
            torch.zeros(width, width, dtype=torch.float64, device=device),
            torch.zeros(width, dtype=torch.float64, device=device),
        )

    def add(self, inputs: Tensor) -> None:  # [tokens, in]
        self.total += inputs.t() @ inputs
        self.sizes += inputs.abs().sum(0)
        self.tokens += len(inputs)

    @classmethod
    def seen(cls, block: Block, site: Site, device: torch.device) -> Moments:
        """Of all texts, by the block as it stands now."""
        made = cls.of(site, device)
        for inputs in block.stream(site):
            made.add(inputs)
        return made

    @property
    def mean_size(self) -> Tensor:
        """Mean of |x|, [in] float32."""
        return (self.sizes / max(self.tokens, 1)).float()

    def gram(self, name: str) -> Tensor:
        """Mean of x x^T. Raises StepError, naming the layer, where an input was NaN or inf or too large to be squared."""
        if not torch.isfinite(self.total).all():
            raise StepError(f"finite activations into {name}", "NaN or inf", "check the model and the texts")
        return self.total / max(self.tokens, 1)


def texts(work: Work) -> Examples:
    """The calibration texts. Raises StepError for none."""
    if work.context.calibration is None:
        raise StepError("texts to calibrate on", "none", "give --calibrate F or --train F")
    return work.context.calibration


def lost(difference: Tensor, gram: Tensor) -> float:
    """Mean over tokens of the squared error of a linear's output: tr(D G D^T); difference: [out, in]."""
    gram = gram.to(difference.dtype)
    return float(((difference @ gram) * difference).sum())


def error(codes: Codes, weight: Tensor, gram: Tensor) -> float:
    """Relative error of a linear's output: the root of what is lost over what there is."""
    return float((max(lost(dequantize(codes) - weight, gram), 0) / max(lost(weight, gram), 1e-30)) ** 0.5)


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
