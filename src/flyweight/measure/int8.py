"""A model in int8 to be timed and thrown away: stored as the `quantize` step does with its defaults, weights rounded plainly.

How long integer kernels take depends on shapes and on the range of the integers, not on how well they were chosen: so a search
for the fastest shapes needs none of what makes int8 accurate, nor data. `tests/measure/test_int8.py` holds it against the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flyweight.artifact import QuantizedTensor
from flyweight.engines.onnxruntime import saturates
from flyweight.models import surgery
from flyweight.models.bundle import Codes

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle

__all__ = ["in_int8"]

TABLE_BITS, LINEAR_BITS, REDUCED_BITS = 8, 8, 7


def in_int8(bundle: Bundle) -> Bundle:
    """The same model (shared, not changed) with codes for all linears and tables; inputs of linears get one scale a batch."""
    names = {id(parameter): name for name, parameter in bundle.model.named_parameters()}
    codes: dict[str, Codes] = {}
    for module, bits in _modules(bundle):
        name = names[id(module.weight)]
        if name not in codes:
            codes[name] = _rounded(surgery.weight_2d(module).detach(), bits, isinstance(module, Conv1D))
    return replace(bundle, quantized=codes, activations="dynamic")


def _modules(bundle: Bundle) -> Iterator[tuple[nn.Module, int]]:
    """Tables first: a linear that shares its weight with one is stored as that."""
    for table in surgery.embeddings(bundle.model, bundle.family).values():
        yield table, TABLE_BITS
    bits = REDUCED_BITS if saturates() else LINEAR_BITS
    for module in bundle.model.modules():
        if isinstance(module, surgery.LINEARS) and surgery.weight_2d(module).numel():  # a part that is gone has none
            yield module, bits


def _rounded(weight: Tensor, bits: int, transposed: bool) -> Codes:
    """[out, in] on a symmetric grid for every row."""
    top = 2 ** (bits - 1) - 1
    scale = weight.float().abs().amax(1, keepdim=True) / top
    scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
    info = QuantizedTensor(
        shape=tuple(weight.shape), bits=bits, scheme="symmetric", granularity="channel", transposed=transposed
    )
    integers = (weight / scale).round().clamp(-top, top) + top + 1
    return Codes(info=info, codes=integers.to(torch.uint8), scale=scale, zero_point=None)
