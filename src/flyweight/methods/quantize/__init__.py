"""Store weights in few bits by rounding to the nearest point of a grid (`grid.py` has the formulas).

Which weights: linears of the blocks get `bits`; linears outside them (pooler, classifier, the projection after ELECTRA's
embeddings) get 8 bits, per channel, as they are well below a percent of the bytes while every answer passes through them
undiluted; embedding tables get `embeddings` bits per row, in the step's scheme (a row is a channel: what is looked up is
one scale and k bits a number). Norms, biases and position biases stay in float. A weight tied to a table is that table.

A pruned weight stays exactly zero; where a grid has no zero (binary) the mask says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flyweight.errors import StepError, nearest
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models import surgery
from flyweight.models.codes import parameter_value

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.context import Context
    from flyweight.models.bundle import Bundle, Codes
    from flyweight.settings import QuantizeSettings

__all__ = ["quantize"]

HEAD_BITS = 8


class Target(NamedTuple):
    """One weight to be quantized. parameter: its name in the model; module: the name that `skip` patterns see."""

    parameter: str
    module: str
    owner: nn.Module
    grid: Grid


def quantize(bundle: Bundle, settings: QuantizeSettings, context: Context) -> Bundle:
    """Round the model's weights (in place) and keep their codes in `bundle.quantized`.

    Raises StepError, before anything is changed: a model already quantized, NaN or inf in a weight (layer named), a group
    that does not divide a layer's inputs, a `skip` pattern that fits no module, nothing to quantize.
    """
    if bundle.quantized:
        raise StepError("a model in float", "one already quantized", "quantize once, starting from the float model")
    targets = _targets(bundle, settings)
    _check(targets)
    quantized: dict[str, Codes] = {}
    errors: dict[str, float] = {}
    for target in context.progress.track(targets, "quantizing", total=len(targets)):
        weight = surgery.weight_2d(target.owner).detach()
        mask = weight != 0 if target.parameter in bundle.sparse else None
        codes = quantize_weight(weight, target.grid, mask, transposed=isinstance(target.owner, Conv1D))
        value = parameter_value(codes)
        parameter = target.owner.get_parameter("weight")
        errors[target.module] = _relative_error(value, parameter)
        with torch.no_grad():
            parameter.copy_(value)
        quantized[target.parameter] = codes
    context.notes.update(_notes(quantized, errors))
    return replace(bundle, quantized=quantized, activations=settings.activations)


def _targets(bundle: Bundle, settings: QuantizeSettings) -> list[Target]:
    names = {id(parameter): name for name, parameter in bundle.model.named_parameters()}
    found: dict[str, Target] = {}
    modules = list(_candidates(bundle, settings))
    for pattern in settings.skip:
        if not any(fnmatchcase(name, pattern) for name, _, _ in modules):
            known = [name for name, _, _ in modules]
            raise StepError(
                "skip: a pattern of module names",
                f"'{pattern}', which fits none{nearest(pattern, known)}",
                f"such as '{known[0]}'",
            )
    for name, module, grid in modules:
        parameter = names[id(module.weight)]
        if parameter not in found and not any(fnmatchcase(name, pattern) for pattern in settings.skip):
            found[parameter] = Target(parameter, name, module, grid)
    if not found:
        raise StepError("something to quantize", "no module left by skip and embeddings", "narrow the skip patterns")
    return list(found.values())


def _candidates(bundle: Bundle, settings: QuantizeSettings) -> Iterator[tuple[str, nn.Module, Grid]]:
    """Tables, linears of the blocks, other linears."""
    scheme = "symmetric" if settings.scheme == "binary" else settings.scheme
    tables = surgery.embeddings(bundle.model, bundle.family)
    if settings.embeddings is not None:
        bits = settings.embeddings
        for name, module in tables.items():
            yield name, module, Grid(bits, "binary" if bits == 1 else scheme, "channel")
    linears = surgery.linears(bundle.model, bundle.family)
    for name, module in linears.items():
        yield name, module, Grid(settings.bits, settings.scheme, settings.granularity, settings.group_size)
    tied = {id(module.weight) for module in tables.values()}
    for name, module in bundle.model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name not in linears and id(module.weight) not in tied:
            yield name, module, Grid(HEAD_BITS, scheme, "channel")


def _check(targets: list[Target]) -> None:
    for target in targets:
        weight = surgery.weight_2d(target.owner)
        if not torch.isfinite(weight).all():
            raise StepError(
                f"finite weights in {target.module}", "NaN or inf", "start from a model whose training did not diverge"
            )
        grid, inputs = target.grid, weight.shape[1]
        if grid.granularity == "group" and inputs % (grid.group_size or 1):
            raise StepError(
                f"a group_size that divides the {inputs} inputs of {target.module}",
                f"{grid.group_size}",
                f"such as {_divisor(inputs, grid.group_size or 1)}, or skip this layer",
            )


def _divisor(inputs: int, wanted: int) -> int:
    """The divisor of `inputs` nearest to what was asked for."""
    return min((n for n in range(1, inputs + 1) if inputs % n == 0), key=lambda n: abs(n - wanted))


def _relative_error(value: Tensor, weight: Tensor) -> float:
    weight = weight.detach()
    return float((value - weight).norm() / weight.norm().clamp(min=1e-30))


def _notes(quantized: dict[str, Codes], errors: dict[str, float]) -> dict[str, object]:
    """What the record of this step says: counts, stored bits a weight (scales included), the layers that changed most."""
    weights = sum(codes.codes.numel() for codes in quantized.values())
    bits = sum(
        codes.codes.numel() * codes.info.bits
        + codes.scale.numel() * 32
        + (0 if codes.zero_point is None else codes.zero_point.numel() * 8)
        for codes in quantized.values()
    )
    worst = sorted(errors.items(), key=lambda item: -item[1])[:5]
    return {
        "weights": weights,
        "tensors": len(quantized),
        "bits_per_weight": round(bits / weights, 4),
        "relative_error": {name: round(error, 6) for name, error in worst},
    }
