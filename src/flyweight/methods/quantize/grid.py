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

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Grid", "quantize_weight"]


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
    make = {"symmetric": _symmetric, "asymmetric": _asymmetric, "ternary": _ternary, "binary": _binary}[grid.scheme]
    codes, scale, zero_point = make(_shared(kept, grid), grid.bits, None if mask is None else _shared(mask, grid))
    codes = codes.reshape(weight.shape)
    if grid.scheme == "binary" and mask is not None:
        codes = codes * mask
    info = QuantizedTensor(
        shape=tuple(weight.shape),
        bits=grid.bits,
        scheme="symmetric" if grid.scheme == "ternary" else grid.scheme,
        granularity=grid.granularity,
        group_size=grid.group_size if grid.granularity == "group" else None,
        transposed=transposed,
    )
    shape = (1,) if grid.granularity == "tensor" else (len(weight), -1)
    return Codes(
        info=info,
        codes=codes.to(torch.uint8),
        scale=scale.reshape(shape),
        zero_point=None if zero_point is None else zero_point.reshape(shape).to(torch.uint8),
        mask=mask,
    )


def _shared(tensor: Tensor, grid: Grid) -> Tensor:
    """[out, in] -> [scales, weights that share one]."""
    if grid.granularity == "tensor":
        return tensor.reshape(1, -1)
    if grid.granularity == "channel":
        return tensor
    if not grid.group_size or tensor.shape[1] % grid.group_size:
        raise ValueError(f"groups of {grid.group_size} do not divide {tensor.shape[1]} inputs")
    return tensor.reshape(-1, grid.group_size)


Parts = tuple["Tensor", "Tensor", "Tensor | None"]


def _symmetric(weight: Tensor, bits: int, mask: Tensor | None) -> Parts:
    half = 1 << (bits - 1)
    scale = _nonzero(weight.abs().amax(1, keepdim=True) / (half - 1))
    return (weight / scale).round().clamp(1 - half, half - 1) + half, scale, None


def _asymmetric(weight: Tensor, bits: int, mask: Tensor | None) -> Parts:
    top = (1 << bits) - 1
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = _nonzero((high - low) / top)
    zero_point = (-low / scale).round().clamp(0, top)
    return ((weight / scale).round() + zero_point).clamp(0, top), scale, zero_point


def _ternary(weight: Tensor, bits: int, mask: Tensor | None) -> Parts:
    size = weight.abs()
    count = weight.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
    kept = size > 0.7 * size.sum(1, keepdim=True) / count
    scale = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
    return weight.sign() * kept + 2, _nonzero(scale), None


def _binary(weight: Tensor, bits: int, mask: Tensor | None) -> Parts:
    count = weight.shape[1] if mask is None else mask.sum(1, keepdim=True).clamp(min=1)
    return (weight >= 0).to(weight.dtype), weight.abs().sum(1, keepdim=True) / count, None


def _nonzero(scale: Tensor) -> Tensor:
    """A row of zeros (or of numbers too small for float32 to divide) is quantized to zeros: any scale will do."""
    return torch.where(scale < torch.finfo(scale.dtype).tiny, torch.ones_like(scale), scale)
