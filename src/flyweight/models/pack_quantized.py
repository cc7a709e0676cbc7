"""The layout `pack-quantized` of compressed-tensors, which transformers reads by itself where that package is installed.

A module's weight [out, in] becomes three tensors beside its other ones:

- `weight_packed` int32 [out, ceil(in * bits / 32)]: codes of k bits without gaps, every row by itself, the first code in the
  lowest bits of the first word. A code is the integer + 2^(bits - 1), which is ours as well.
- `weight_scale`  float32 [out, 1] or [out, groups]
- `weight_shape`  int64 [2]

config.json says which modules are packed how (`quantization_config`). The package unpacks all of it to float32, at the first
forward pass or, with `dequantize`, while loading: the saving is one on disk. Tables need the second way (transformers 5.23 looks
for the `weight` of every table after loading), and that one knows a single grid for the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from flyweight.models.bundle import OPTIONAL, Bundle, Codes
from flyweight.models.packing import pack_bits, unpack_bits

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.artifact import QuantizedTensor

__all__ = ["SUFFIXES", "misfit", "pack", "quantization_config", "unpack"]

SUFFIXES = ("_packed", "_scale", "_shape")


def misfit(bundle: Bundle) -> str | None:
    """Why the layout cannot hold this model, or None where it can."""
    if not bundle.quantized:
        return "nothing is quantized"
    if bundle.activations != "none":
        return f"inputs of linears are rounded ({bundle.activations})"
    if bundle.sparse:
        return "some weights are stored as bitmask and values"
    readers = _readers(bundle.model)
    for name, codes in bundle.quantized.items():
        info, modules = codes.info, readers.get(id(bundle.model.get_parameter(name)), [])
        if len(modules) != 1:
            return f"{name} belongs to several modules"
        if not isinstance(modules[0], nn.Linear | nn.Embedding) or info.transposed:
            return f"{name} belongs to a {type(modules[0]).__name__}"
        if info.scheme != "symmetric":
            return f"{name} has a grid that is {info.scheme}"
        if info.granularity == "tensor":
            return f"{name} has one scale in all"
        if codes.mask is not None or any(getattr(codes, part) is not None for part in OPTIONAL):
            return f"{name} is pruned, smoothed or has outliers"
    if _tables(bundle) and len({_grid(codes) for codes in bundle.quantized.values()}) > 1:
        return "tables and linears have different bits or groups"
    return None


def _tables(bundle: Bundle) -> bool:
    """Whether some table is quantized."""
    modules = (bundle.model.get_submodule(name.rpartition(".")[0]) for name in bundle.quantized)
    return any(isinstance(module, nn.Embedding) for module in modules)


def _grid(codes: Codes) -> tuple[int, int | None]:
    return codes.info.bits, codes.info.group_size


def _readers(model: nn.Module) -> dict[int, list[nn.Module]]:
    found: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found.setdefault(id(parameter), []).append(module)
    return found


def quantization_config(bundle: Bundle) -> dict[str, Any]:
    """The entry of config.json: one group for all modules of the same bits and groups."""
    groups: dict[tuple[int, int | None], set[str]] = {}
    for name, codes in bundle.quantized.items():
        groups.setdefault(_grid(codes), set()).add(name.removesuffix(".weight"))
    every = {name for name, module in bundle.model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    prefix = f"({re.escape(bundle.model.base_model_prefix)}\\.)?"
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": _tables(bundle),
        "ignore": [],
        "config_groups": {
            f"group_{number}": {
                "targets": [f"re:^{prefix}{pattern}$" for pattern in _patterns(names, every, bundle)],
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel" if size is None else "group",
                    "group_size": size,
                },
                "input_activations": None,
                "output_activations": None,
            }
            for number, ((bits, size), names) in enumerate(groups.items())
        },
    }


def _patterns(names: set[str], every: set[str], bundle: Bundle) -> list[str]:
    """Regular expressions for these modules, without the base model's prefix: numbers of layers as \\d+ where all are meant."""
    start = f"{bundle.model.base_model_prefix}."
    found = set()
    for name in names:
        exact = re.escape(name.removeprefix(start))
        general = re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", exact)
        reached = {other for other in every if re.fullmatch(general, other.removeprefix(start))}
        found.add(general if reached <= names else exact)
    return sorted(found)


def pack(codes: Codes) -> dict[str, Tensor]:
    """By the end of the tensor's name, after that of the weight."""
    (rows, columns), bits = codes.info.shape, codes.info.bits
    padded = np.pad(codes.codes.detach().cpu().numpy(), ((0, 0), (0, -columns % 32)))  # 32 codes fill whole words
    stored = pack_bits(padded, bits).reshape(rows, -1)[:, : _words(columns, bits) * 4]
    words = torch.from_numpy(np.ascontiguousarray(stored).view("<i4").astype(np.int32))
    return {"_packed": words, "_scale": codes.scale, "_shape": torch.tensor([rows, columns])}


def _words(columns: int, bits: int) -> int:
    return -(-columns * bits // 32)


def unpack(info: QuantizedTensor, take: Callable[[str], Tensor]) -> Codes:
    """What `pack` packed; `take` gives the tensor of a suffix. Raises ValueError where the parts do not fit one another."""
    (rows, columns), wide = info.shape, _words(info.shape[1], info.bits)
    words, scale, shape = (take(suffix) for suffix in SUFFIXES)
    if shape.tolist() != [rows, columns] or words.dtype != torch.int32 or list(words.shape) != [rows, wide]:
        raise ValueError(f"int32 words [{rows}, {wide}] for {rows} x {columns} codes of {info.bits} bits expected")
    padded = columns + -columns % 32
    stored = words.numpy().astype("<i4").view(np.uint8).reshape(rows, -1)
    whole = np.pad(stored, ((0, 0), (0, padded * info.bits // 8 - stored.shape[1])))
    codes = unpack_bits(whole, info.bits, rows * padded).reshape(rows, padded)[:, :columns]
    return Codes(info, torch.from_numpy(np.ascontiguousarray(codes)), scale, None)
