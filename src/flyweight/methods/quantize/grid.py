"""Rounding to the nearest point of a grid: pure functions over one weight [out, in], no model in sight.

symmetric   W ~ s * n,       n in -(2^(b-1)-1) .. 2^(b-1)-1,  s = max|W| / (2^(b-1)-1)
asymmetric  W ~ s * (q - z), q, z in 0 .. 2^b - 1,            s = (max(W, 0) - min(W, 0)) / (2^b - 1)
binary      W ~ s * sign(W), s = mean|W|: the least squares solution (Rastegari et al. 2016, XNOR-Net, eq. 6)
ternary     W ~ s * n, n = sign(W) where |W| > 0.7 mean|W|, else 0; s = mean|W| where n is not 0 (Li et al. 2016, Ternary
            Weight Networks, eq. 5 and 6). What comes out is a symmetric grid of 2 bits, which has just these points.

Extremes and means are taken over what shares one scale: the tensor, a row, or `group_size` inputs of a row. Zero is always
a point of the first two (asymmetric ranges are stretched to contain it, as ONNX's DynamicQuantizeLinear does), so pruned
weights and padding stay exactly zero. Ties round to even, as in ONNX.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from flyweight.artifact import QuantizedTensor
from flyweight.models.bundle import Codes
from flyweight.models.codes import expand

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Grid", "codes_at", "limits", "quantize_weight", "scales_of", "units"]


class Grid(NamedTuple):
    """What the points are and what shares a scale. `group_size` matters where granularity is "group"."""

    bits: int
    scheme: Literal["symmetric", "asymmetric", "ternary", "binary"] = "symmetric"
    granularity: Literal["tensor", "channel", "group"] = "channel"
    group_size: int | None = None


def quantize_weight(
    weight: Tensor,  # [out, in], finite
    grid: Grid,
    mask: Tensor | None = None,  # [out, in] bool, False where pruned
    transposed: bool = False,
) -> Codes:
    """Nearest codes of `weight`; those of pruned weights mean exactly zero. Raises ValueError where groups do not divide."""
    weight = weight.detach().to(torch.float32)
    kept = weight if mask is None else weight * mask
    if grid.scheme in ("symmetric", "asymmetric"):
        scale, zero_point = scales_of(kept, grid)
        return codes_at(kept / expand(scale, grid), grid, scale, zero_point, mask, transposed)
    make = _ternary if grid.scheme == "ternary" else _binary
    codes, scale = make(units(kept, grid), None if mask is None else units(mask, grid))
    codes = codes.reshape(weight.shape)
    if grid.scheme == "binary" and mask is not None:
        codes = codes * mask
    return _made(codes, grid, scale.reshape(_shape(weight, grid)), None, mask, transposed)


def scales_of(
    weight: Tensor,  # [out, in], 0 where pruned
    grid: Grid,  # symmetric or asymmetric
    share: Tensor
    | float = 1.0,  # of the range that the grid covers, or one for each unit [scales, 1]; the rest saturates
) -> tuple[Tensor, Tensor | None]:
    """(scale, zero_point or None) as `Codes` keeps them: from extremes, cut off to `share`."""
    parts, shape = units(weight, grid), _shape(weight, grid)
    if grid.scheme == "symmetric":
        top = parts.abs().amax(1, keepdim=True) * share
        return _nonzero(top / limits(grid)[1]).reshape(shape), None
    points = limits(grid)[1]
    low, high = parts.amin(1, keepdim=True).clamp(max=0) * share, parts.amax(1, keepdim=True).clamp(min=0) * share
    scale = _nonzero((high - low) / points)
    return scale.reshape(shape), (-low / scale).round().clamp(0, points).reshape(shape).to(torch.uint8)


def codes_at(
    steps: Tensor,  # [out, in] float, weights in units of their scale
    grid: Grid,  # symmetric or asymmetric
    scale: Tensor,
    zero_point: Tensor | None,
    mask: Tensor | None = None,
    transposed: bool = False,
) -> Codes:
    """The codes nearest to `steps` on a grid whose scale and zero-point are given; those of pruned weights mean zero."""
    nearest = steps.detach().round()
    nearest = nearest if mask is None else nearest * mask
    zero = 0 if zero_point is None else expand(zero_point, grid).to(nearest.dtype)
    codes = (nearest + zero).clamp(*limits(grid))
    return _made(codes + (1 << (grid.bits - 1)) * (zero_point is None), grid, scale, zero_point, mask, transposed)


def limits(grid: Grid) -> tuple[int, int]:
    """First and last integer: of what the scale multiplies (symmetric), or of the codes (asymmetric)."""
    if grid.scheme == "asymmetric":
        return 0, (1 << grid.bits) - 1
    return 1 - (1 << (grid.bits - 1)), (1 << (grid.bits - 1)) - 1


def units(tensor: Tensor, grid: Grid) -> Tensor:
    """[out, in] -> [scales, weights that share one]."""
    if grid.granularity == "tensor":
        return tensor.reshape(1, -1)
    if grid.granularity == "channel":
        return tensor
    if not grid.group_size or tensor.shape[1] % grid.group_size:
        raise ValueError(f"groups of {grid.group_size} do not divide {tensor.shape[1]} inputs")
    return tensor.reshape(-1, grid.group_size)


def _shape(weight: Tensor, grid: Grid) -> tuple[int, ...]:
    return (1,) if grid.granularity == "tensor" else (len(weight), -1)


def _made(
    codes: Tensor, grid: Grid, scale: Tensor, zero_point: Tensor | None, mask: Tensor | None, transposed: bool
) -> Codes:
    info = QuantizedTensor(
        shape=tuple(codes.shape),
        bits=grid.bits,
        scheme="symmetric" if grid.scheme == "ternary" else grid.scheme,
        granularity=grid.granularity,
        group_size=grid.group_size if grid.granularity == "group" else None,
        transposed=transposed,
    )
    return Codes(info=info, codes=codes.to(torch.uint8), scale=scale, zero_point=zero_point, mask=mask)


def _ternary(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    size = weight.abs()
    count = weight.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
    kept = size > 0.7 * size.sum(1, keepdim=True) / count
    scale = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return weight.sign() * kept + 2, _nonzero(scale)


def _binary(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    count = weight.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
    return (weight >= 0).to(weight.dtype), weight.abs().sum(1, keepdim=True) / count


def _nonzero(scale: Tensor) -> Tensor:
    """A row of zeros (or of numbers too small for float32 to divide) is quantized to zeros: any scale will do."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
