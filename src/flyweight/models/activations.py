"""What dynamic int8 does to the inputs of a linear, while torch runs: so that torch answers as the engine will."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.models.bundle import Bundle

__all__ = ["dynamic_quantize", "fake_quantize", "simulate"]


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
    """`value` rounded to the grid that it gets at run time."""
    codes, scale, zero_point = dynamic_quantize(value.float())
    return ((codes.to(torch.int16) - zero_point).float() * scale).to(value.dtype)


@contextmanager
def simulate(bundle: Bundle) -> Iterator[None]:
    """Round the inputs of quantized linears (not of embeddings) while this is open; nothing happens without dynamic activations.

    The range is that of the whole batch, padding included, exactly as in the engine: answers depend on the neighbours.
    """
    hooks = []
    if bundle.activations == "dynamic":
        quantized = {id(bundle.model.get_parameter(name)) for name in bundle.quantized}
        for module in bundle.model.modules():
            if isinstance(module, nn.Linear | Conv1D) and id(module.weight) in quantized:
                hooks.append(module.register_forward_pre_hook(_round_input))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _round_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (fake_quantize(inputs[0]), *inputs[1:])
