"""Integers back to weights: the one place that says what a code means (`methods.quantize.grid` makes them)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.models.bundle import Codes

__all__ = ["dequantize", "described", "expand", "integers", "parameter_value", "zero_codes"]


def integers(codes: Codes) -> Tensor:
    """[out, in] int16: what is multiplied by the scale, 0 where pruned.

    symmetric:  code - 2^(bits-1), in -(2^(bits-1)-1) .. 2^(bits-1)-1, so it fits int8
    binary:     2 * code - 1, that is -1 or +1
    asymmetric: code - zero_point, in -255 .. 255
    """
    value = codes.codes.to(torch.int16)
    value = 2 * value - 1 if codes.info.scheme == "binary" else value - zero_codes(codes)
    return value if codes.mask is None else value * codes.mask


def zero_codes(codes: Codes) -> Tensor | int:
    """The code of an exact zero: a number, or for asymmetric grids int16 that broadcasts to [out, in].

    A binary grid has no zero; its pruned weights carry code 0 and are zero by the mask alone.
    """
    info = codes.info
    if info.scheme == "binary":
        return 0
    if codes.zero_point is None:
        return 1 << (info.bits - 1)
    return expand(codes.zero_point, info).to(torch.int16)


def dequantize(codes: Codes) -> Tensor:
    """[out, in] float32: the weight that the codes stand for. Transposed modules (Conv1D) need `parameter_value`."""
    value = integers(codes).to(torch.float32) * expand(codes.scale, codes.info)
    if codes.smooth is not None:
        value = value / codes.smooth
    if codes.outliers is not None and codes.outlier_values is not None:
        value[:, codes.outliers] = codes.outlier_values
    return value


def described(codes: Codes) -> Codes:
    """The same with `info` saying which of the optional parts there are; whoever adds one with `replace` ends with this."""
    info = codes.info.model_copy(
        update={
            "smooth": codes.smooth is not None,
            "outliers": 0 if codes.outliers is None else len(codes.outliers),
            "static": codes.input_scale is not None,
            "shifted": codes.input_shift is not None,
        }
    )
    return replace(codes, info=info)


def parameter_value(codes: Codes) -> Tensor:
    """The same in the layout of the module's own weight: [in, out] where `info.transposed`."""
    value = dequantize(codes)
    return value.t() if codes.info.transposed else value


def expand(values: Tensor, info: Any) -> Tensor:
    """Scales or zero-points [1], [out, 1] or [out, groups] -> something that broadcasts to [out, in]."""
    if info.granularity == "group":
        return values.repeat_interleave(info.group_size, dim=1)
    return values
