"""What int8 activations do to the inputs of a linear, while torch runs: so that torch answers as the engine will."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flyweight.models.codes import integer_bias

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.models.bundle import Bundle, Codes

__all__ = [
    "dynamic_quantize",
    "fake_quantize",
    "quantized_linears",
    "round_static",
    "round_tokens",
    "rounded_biases",
    "rounding",
    "simulate",
]


def dynamic_quantize(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 of any shape -> (uint8 of that shape, scale, zero-point), bit for bit ONNX's DynamicQuantizeLinear.

    One scale for the whole tensor; the range is stretched to contain 0; halves round to even; what leaves 0..255 saturates.
    """
    low, high = value.amin().clamp(max=0), value.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero_point = (-low / scale).round().clamp(0, 255)
    codes = ((value / scale).round() + zero_point).clamp(0, 255)
    return codes.to(torch.uint8), scale, zero_point.to(torch.uint8)


def fake_quantize(value: Tensor) -> Tensor:
    """`value` rounded to the grid that it gets at run time, one for the whole tensor."""
    codes, scale, zero_point = dynamic_quantize(value.float())
    return ((codes.to(torch.int16) - zero_point).float() * scale).to(value.dtype)


def round_tokens(value: Tensor) -> Tensor:
    """[..., width] rounded to -127 .. 127 times a scale of its own for every token: max|x| / 127."""
    scale = value.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (value / scale).round().clamp(-127, 127) * scale


def round_static(value: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """[..., width] rounded to a fixed uint8 grid, as ONNX's QuantizeLinear and DequantizeLinear do; the rest saturates."""
    scale, zero = scale.to(value.device), zero_point.to(value.device, value.dtype)
    return (((value / scale).round() + zero).clamp(0, 255) - zero) * scale


@contextmanager
def simulate(bundle: Bundle) -> Iterator[None]:
    """Round the inputs of quantized linears (not of embeddings) while this is open, by `bundle.activations`.

    dynamic: the range is that of the whole batch, padding included, exactly as in the engine: answers depend on the neighbours.
    """
    with ExitStack() as stack:
        for name, modules in quantized_linears(bundle).items() if bundle.activations != "none" else ():
            for module in modules:
                stack.enter_context(rounding(module, bundle.quantized[name], bundle.activations))
        yield


@contextmanager
def rounding(module: nn.Module, codes: Codes, activations: str) -> Iterator[None]:
    """The same for one linear."""
    how = _rounding(codes, activations)
    if how is None:
        yield
        return
    hook = module.register_forward_pre_hook(partial(_round_input, codes, how))
    try:
        with _rounded_bias(module, codes) if activations == "static" else nullcontext():
            yield
    finally:
        hook.remove()


@contextmanager
def rounded_biases(bundle: Bundle) -> Iterator[None]:
    """Biases as `simulate` has them where activations are static, and nothing else rounded."""
    with ExitStack() as stack:
        for name, modules in quantized_linears(bundle).items() if bundle.activations == "static" else ():
            for module in modules:
                stack.enter_context(_rounded_bias(module, bundle.quantized[name]))
        yield


@contextmanager
def _rounded_bias(module: nn.Module, codes: Codes) -> Iterator[None]:
    held = integer_bias(codes, module.bias if isinstance(module.bias, nn.Parameter) else None)
    hook = None if held is None else module.register_forward_hook(partial(_add, held.error))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def quantized_linears(bundle: Bundle) -> dict[str, list[nn.Module]]:
    """{parameter name: the linears that multiply by it} for everything in `bundle.quantized`; tables have none."""
    names = {id(bundle.model.get_parameter(name)): name for name in bundle.quantized}
    found: dict[str, list[nn.Module]] = {}
    for module in bundle.model.modules():
        if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in names:
            found.setdefault(names[id(module.weight)], []).append(module)
    return found


Rounding = Callable[["Tensor"], "Tensor"]


def _rounding(codes: Codes, activations: str) -> Rounding | None:
    """What happens to (x - shift) / smooth, or None where the input stays in float."""
    if activations == "dynamic":
        return fake_quantize
    if activations == "token":
        return round_tokens
    if codes.input_scale is None or codes.input_zero_point is None:
        return None
    return partial(round_static, scale=codes.input_scale, zero_point=codes.input_zero_point)


def _add(change: Tensor, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + change.to(output)


def _round_input(codes: Codes, how: Rounding, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The input whose product with the (dequantized) weight is what the engine computes; outliers pass as they are."""
    x = inputs[0]
    smooth = codes.smooth.to(x.device) if codes.smooth is not None else None
    shift = codes.input_shift.to(x.device) if codes.input_shift is not None else None
    inner = x if shift is None else x - shift
    inner = inner if smooth is None else inner / smooth
    if codes.outliers is not None:  # the engine sees zeros there
        inner = inner.index_fill(-1, codes.outliers.to(x.device), 0)
    rounded = how(inner)
    if smooth is not None:
        rounded = rounded * smooth
    if shift is not None:
        rounded = rounded + shift
    if codes.outliers is not None:
        where = codes.outliers.to(x.device)
        rounded = rounded.index_copy(-1, where, x.index_select(-1, where))
    return (rounded, *inputs[1:])
