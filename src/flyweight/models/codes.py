"""Integers back to weights: the one place that says what a code means (`methods.quantize.grid` makes them)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.models.bundle import Codes

__all__ = [
    "IntegerBias",
    "dequantize",
    "described",
    "expand",
    "integer_bias",
    "integers",
    "parameter_value",
    "zero_codes",
]

FINE = 7  # bits of a weight from which on its steps are fine enough for a bias
LARGEST = 2**30  # of an integer bias: as much again is left for the product
OF_ZEROS = 2.0**-16  # steps of the bias of a row of zeros


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


class IntegerBias(NamedTuple):
    """integers [out] int32 in steps [out] or [] float32 of input scale times weight scale; value: [out], bias + shift @ weight^T

    scale: of the weight, as `Codes` has it, but for rows of zeros, which any scale fits
    """

    integers: Tensor
    steps: Tensor
    scale: Tensor
    value: Tensor

    @property
    def error(self) -> Tensor:
        """[out] float32: what is added less what should be."""
        return (self.integers.double() * self.steps.double() - self.value).float()


def integer_bias(codes: Codes, bias: Tensor | None) -> IntegerBias | None:
    """What a linear with a fixed input grid adds, as its int32 product can take it; None: it is added in float.

    That is where there is nothing to add, where weights of fewer than FINE bits make the steps coarse, and where an integer
    would be larger than LARGEST. With 8 bits a bias is then off by at most 1/127 of what rounding one input can do to the answer.
    """
    if codes.input_scale is None or codes.info.granularity == "group" or codes.info.bits < FINE:
        return None
    if bias is None and codes.input_shift is None:
        return None
    value = torch.zeros(codes.info.shape[0], device=codes.scale.device) if bias is None else bias.detach()
    value = value.to(codes.scale.device, torch.float64)
    value = value if codes.of_shift is None else value + codes.of_shift
    scale = codes.scale
    if codes.info.granularity == "channel":
        scale = torch.where(codes.zero_rows[:, None], OF_ZEROS / codes.input_scale, scale)
    steps = (codes.input_scale * scale.flatten()).float()
    found = (value / steps.double()).round()
    if not bool((found.abs() <= LARGEST).all()):
        return None
    return IntegerBias(
        found.to(torch.int32), steps.reshape(()) if codes.info.granularity == "tensor" else steps, scale, value
    )


def expand(values: Tensor, info: Any) -> Tensor:
    """Scales or zero-points [1], [out, 1] or [out, groups] -> something that broadcasts to [out, in]."""
    if info.granularity == "group":
        return values.repeat_interleave(info.group_size, dim=1)
    return values
