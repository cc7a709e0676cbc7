"""Rounding that gradients can pass: fake quantizers for training, pure functions and the parameters they learn.

Every rounding here is exact in the forward pass: what a quantizer answers is bit for bit what its codes stand for. In the
backward pass it is its surrogate, the function below with what stands in [brackets] taken for a constant:

steps    s * (c + [round(c) - c]),  c = clamp(w / s, lo, hi): so d/ds is round(w/s) - w/s inside, lo or hi outside, and
         d/dw is 1 inside, 0 outside (Esser et al. 2020, Learned Step Size Quantization, eq. 3 and 5). Symmetric grids:
         lo = -(2^(b-1)-1), hi = 2^(b-1)-1; asymmetric ones: lo = -z, hi = 2^b-1 - z with an integer z that stays fixed.
ternary  s * [n] + w - [w],  n = sign(w) where |w| > 0.7 mean|w|, else 0: the threshold follows the weights as in Li et al.
         2016, eq. 6; s is learned (one scale for both signs, where Zhu et al. 2017, Trained Ternary Quantization, have two)
binary   s * [sign(w)] + clamp(w, -[3 s], [3 s]) - [the same]: Rastegari et al. 2016 with a learned s and the clipped
         straight-through estimator of Hubara et al. 2016, eq. 4, in units of the scale
static   s * (clamp(t + z + [rounding], 0, 255) - z - [rounding]),  t = x / s: scale and zero-point are learned
         (Bhalgat et al. 2020, LSQ+, eq. 5 to 8); the zero-point is rounded in the same way, since kernels want an integer
dynamic, token   x + [Q(x) - x]: the range contains all x, nothing is cut off

What is learned is log s, so that s stays above zero and a step of Adam changes scales of all sizes by the same share (Jain et
al. 2020, section 3.3). Gradients of scales are multiplied by 1 / sqrt(n * hi), n the weights that share one (Esser et
al. 2020, section 2.2); with Adam this matters for the clipped norm alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from flyweight.methods.quantize.grid import Grid, codes_at, limits, quantize_weight, scales_of, units
from flyweight.methods.quantize.ranges import grid_of, mse
from flyweight.models.activations import fake_quantize, round_tokens
from flyweight.models.codes import dequantize

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.models.bundle import Codes

__all__ = ["InputQuantizer", "WeightQuantizer", "binary", "round_input", "round_rows", "static", "steps", "ternary"]

CLIP = 3.0
"""Binary weights larger than so many scales get no gradient."""
SHARES = tuple(share / 20 for share in range(2, 21))
SMALLEST = 1e-12  # of a scale


def through(value: Tensor, answer: Tensor) -> Tensor:
    """`answer` forwards, the gradient goes to `value`; exact, as value - value is zero."""
    return answer.detach() + (value - value.detach())


def slower(value: Tensor, factor: float) -> Tensor:
    """`value` forwards, its gradient times `factor` backwards."""
    return value.detach() + (value - value.detach()) * factor


def steps(weight: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int) -> Tensor:
    """Clipped and rounded to multiples low .. high of the scale; what broadcasts to [out, in] will do."""
    inner = (weight / scale).clamp(low, high)  # type: ignore[arg-type]
    return through(inner, inner.round()) * scale


def ternary(weight: Tensor, scale: Tensor, codes: Tensor) -> Tensor:
    """codes: -1, 0, 1 by the threshold"""
    return through(weight, torch.zeros_like(weight)) + codes.detach() * scale


def binary(weight: Tensor, scale: Tensor) -> Tensor:
    limit = CLIP * scale.detach()
    sign = torch.where(weight.detach() >= 0, 1.0, -1.0).to(weight.dtype)
    return through(weight.clamp(-limit, limit), torch.zeros_like(weight)) + sign * scale


def static(value: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """As `activations.round_static`; zero: any number, rounded into 0 .. 255"""
    zero = zero.clamp(0, 255)
    zero = through(zero, zero.round())
    inner = value / scale
    return ((through(inner, inner.round()) + zero).clamp(0, 255) - zero) * scale


def round_input(value: Tensor, activations: str) -> Tensor:
    """Inputs of a linear on a grid that is found at run time: `dynamic` or `token`."""
    return through(value, (fake_quantize if activations == "dynamic" else round_tokens)(value.detach()))


def round_rows(rows: Tensor, grid: Grid) -> Tensor:
    """Rows of a table, [..., width], each on the grid that is nearest to it as it stands now."""
    flat = rows.detach().reshape(-1, rows.shape[-1])
    return through(rows, dequantize(quantize_weight(flat, grid)).reshape(rows.shape).to(rows.dtype))


@dataclass
class WeightQuantizer:
    """One weight's grid while it is trained.

    log_scale:  [1] or [out, 1], learned
    zero_point: as `Codes` has it, fixed
    mask:       [out, in] bool, False where pruned
    """

    grid: Grid
    log_scale: nn.Parameter
    zero_point: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def begin(cls, weight: Tensor, grid: Grid, mask: Tensor | None = None) -> WeightQuantizer:
        """Start from the scales of least squared error for `weight` [out, in]: see `best_scales`."""
        scale, zero_point = best_scales(weight.detach().float(), grid, mask)
        return cls(grid, nn.Parameter(scale.clamp(min=SMALLEST).log()), zero_point, mask)

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.log_scale

    @property
    def scale(self) -> Tensor:
        """As `Codes` has it, with its gradient made slower."""
        return self.log_scale.exp()

    def value(self, weight: Tensor) -> Tensor:
        """The weight [out, in] that `codes` stand for, with gradients for weight and scale."""
        shared = weight.numel() / self.log_scale.numel()
        scale = slower(self.scale.to(weight.device), 1 / math.sqrt(shared * max(limits(self.grid)[1], 1)))
        if self.grid.scheme == "binary":
            found = binary(weight, scale)
        elif self.grid.scheme == "ternary":
            found = ternary(weight, scale, self._nearest(weight).codes.to(weight.dtype) - 2)
        elif self.zero_point is None:
            found = steps(weight, scale, *limits(self.grid))
        else:
            zero = self.zero_point.to(weight.device, weight.dtype)
            found = steps(weight, scale, -zero, limits(self.grid)[1] - zero)
        return found if self.mask is None else found * self.mask.to(weight.device)

    @torch.no_grad()
    def codes(self, weight: Tensor, transposed: bool = False) -> Codes:
        """weight: [out, in]; transposed: as in `quantize_weight`"""
        scale = self.scale.to(weight.device)
        if self.grid.scheme in ("binary", "ternary"):
            return replace(self._nearest(weight, transposed), scale=scale)
        zero = None if self.zero_point is None else self.zero_point.to(weight.device)
        return codes_at(weight / scale, self.grid, scale, zero, self._mask(weight), transposed)

    def _mask(self, weight: Tensor) -> Tensor | None:
        return None if self.mask is None else self.mask.to(weight.device)

    def _nearest(self, weight: Tensor, transposed: bool = False) -> Codes:
        return quantize_weight(weight, self.grid, self._mask(weight), transposed)


def best_scales(weight: Tensor, grid: Grid, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(scale, zero_point or None) to begin with: of the extremes cut off to SHARES and of Esser et al.'s 2 mean|w| / sqrt(hi),
    section 2.1, those with the least squared error, for every unit. Ternary and binary: the grid's own formula."""
    if grid.scheme in ("binary", "ternary"):
        return quantize_weight(weight, grid, mask).scale, None
    kept = weight if mask is None else weight * mask
    candidates = [scales_of(kept, grid, share) for share in SHARES]
    if grid.scheme == "symmetric":
        parts, there = units(kept, grid), torch.ones_like(kept) if mask is None else mask
        mean = parts.abs().sum(1, keepdim=True) / units(there, grid).sum(1, keepdim=True).clamp(min=1)
        paper = 2 * mean / math.sqrt(limits(grid)[1])
        candidates.append((paper.clamp(min=SMALLEST).reshape(candidates[0][0].shape), None))
    found = [(_error(kept, grid, *pair, mask), *pair) for pair in candidates]
    least, scale, zero_point = found[0]
    for error, other, zero in found[1:]:
        better = error < least
        least = torch.where(better, error, least)
        better = better.reshape(scale.shape)
        scale = torch.where(better, other, scale)
        zero_point = None if zero is None or zero_point is None else torch.where(better, zero, zero_point)
    return scale, zero_point


def _error(weight: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None, mask: Tensor | None) -> Tensor:
    value = dequantize(codes_at(weight / scale, grid, scale, zero_point, mask))
    return units((value - weight).square(), grid).sum(1)


@dataclass
class InputQuantizer:
    """The static uint8 grid that linears reading one tensor share.

    log_scale, edge: [1], learned; the zero-point is 255 * edge, rounded
    width: features of the tensor, which the gradient's factor is for
    """

    log_scale: nn.Parameter
    edge: nn.Parameter
    width: int

    @classmethod
    def begin(cls, sample: Tensor) -> InputQuantizer:
        """sample: [tokens, width]; the range has the least squared error (`ranges.mse`)."""
        scale, zero_point = grid_of(mse(sample.cpu()))
        return cls(nn.Parameter(scale.log()), nn.Parameter(zero_point.float() / 255), sample.shape[-1])

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.log_scale
        yield self.edge

    def value(self, given: Tensor) -> Tensor:
        factor = 1 / math.sqrt(self.width * 255)
        scale, edge = self.log_scale.exp().to(given.device), self.edge.to(given.device)
        return static(given, slower(scale, factor), 255 * slower(edge, factor))

    @torch.no_grad()
    def grid(self) -> tuple[Tensor, Tensor]:
        """(input_scale, input_zero_point) as `Codes` has them."""
        return self.log_scale.exp(), (255 * self.edge).clamp(0, 255).round().to(torch.uint8)
