"""A quantize step under way: what is to be rounded to which grid, and where the codes go."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from flyweight.engines.onnxruntime import saturates
from flyweight.errors import StepError, nearest
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models import surgery
from flyweight.models.codes import dequantize, described, parameter_value

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.calibration import Site
    from flyweight.context import Context
    from flyweight.models.bundle import Bundle, Codes
    from flyweight.settings import QuantizeSettings

__all__ = ["Target", "Work", "stored_bits", "targets_of", "widest"]

HEAD_BITS = 8
REDUCED_BITS = 7  # 255 x 64 + 255 x 64 = 32640: within 16 bits, as 255 x 127 + 255 x 127 = 64770 is not


def widest(settings: QuantizeSettings) -> int:
    """Bits that linears may have, by `reduce_range`: 7 where integer kernels add pairs of uint8 x int8 products in 16 bits."""
    if settings.activations == "none" or settings.reduce_range == "off":
        return 8
    return REDUCED_BITS if settings.reduce_range == "on" or saturates() else 8


class Target(NamedTuple):
    """One weight to be quantized.

    parameter: its name in the model; module: the name that `skip` patterns see; part: "table", "block" or "head"
    """

    parameter: str
    module: str
    owner: nn.Module
    grid: Grid
    part: str

    @property
    def transposed(self) -> bool:
        """Whether the module keeps its weight as [in, out]."""
        return isinstance(self.owner, Conv1D)


@dataclass
class Work:
    """targets: by module name; codes, errors: what was put so far, by parameter and by module; notes: for the record

    floats: weights as they were before they were put, by parameter, of what is put
    biases: as they were before they were corrected for rounding, by module name
    room: bits of a budget that are left for outlier channels; None without a budget
    reserved: outlier channels that the budget keeps bits for in every linear
    """

    bundle: Bundle
    settings: QuantizeSettings
    context: Context
    targets: dict[str, Target]
    codes: dict[str, Codes] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    room: int | None = None
    reserved: int = 0

    def __post_init__(self) -> None:
        if widest(self.settings) < self.settings.bits:
            self.notes["reduced_range"] = widest(self.settings)
            self.context.progress.note(
                "linears take 7 bits, so that no sum saturates on a CPU without VNNI (reduce_range)"
            )

    def of(self, part: str) -> list[Target]:
        return [target for target in self.targets.values() if target.part == part]

    def at(self, site: Site) -> list[Target]:
        """The targets among a site's linears: those left out by `skip`, and a second name of a tied weight, are not there."""
        return [self.targets[name] for name in site.linears if name in self.targets]

    def weight(self, target: Target) -> Tensor:
        """The float weight [out, in] as it was before the step, on the model's device."""
        kept = self.floats.get(target.parameter)
        return surgery.weight_2d(target.owner).detach() if kept is None else kept.to(self.bundle.device)

    def mask(self, target: Target) -> Tensor | None:
        """[out, in] bool, False where the weight was pruned, or None."""
        return self.weight(target) != 0 if target.parameter in self.bundle.sparse else None

    def nearest(self, target: Target, grid: Grid | None = None) -> None:
        """Round `target` to its grid, or to another one, and put it."""
        self.put(target, self.rounded(target, grid))

    def rounded(self, target: Target, grid: Grid | None = None, weight: Tensor | None = None) -> Codes:
        """The nearest codes of `target`, or of what it is made of it, on its grid or on another one."""
        value = self.weight(target) if weight is None else weight
        return quantize_weight(value, grid or target.grid, self.mask(target), target.transposed)

    def put(self, target: Target, codes: Codes) -> None:
        """The model's parameter takes the values that `codes` stand for; the float weight is kept until the step is done."""
        codes = described(codes)
        if target.parameter not in self.floats:
            self.floats[target.parameter] = self.weight(target).to("cpu", copy=True)
        with torch.no_grad():
            target.owner.get_parameter("weight").copy_(parameter_value(codes))
        self.codes[target.parameter] = codes
        self.errors[target.module] = relative_error(surgery.weight_2d(target.owner).detach(), self.weight(target))

    def lost(self, target: Target, codes: Codes) -> Tensor | None:
        """[out], (W - W') z: with a shift z of the inputs the bias takes it, so that z W^T is exact. None without a shift."""
        if codes.input_shift is None:
            return None
        return (self.weight(target) - dequantize(codes)) @ codes.input_shift

    def keep_biases(self) -> None:
        """Called before biases are changed: a layer that falls back needs the one it had."""
        for target in self.targets.values():
            bias = getattr(target.owner, "bias", None)
            if bias is not None:
                self.biases.setdefault(target.module, bias.detach().clone())

    def take_back(self, target: Target) -> None:
        """The float weight again, which what comes before a new rounding may change (`folding`)."""
        if target.parameter not in self.codes:
            return
        with torch.no_grad():
            surgery.weight_2d(target.owner).copy_(self.floats.pop(target.parameter))
        del self.codes[target.parameter], self.errors[target.module]


def targets_of(bundle: Bundle, settings: QuantizeSettings) -> dict[str, Target]:
    """By module name. Raises StepError, before anything is changed: see `flyweight.methods.quantize.quantize`."""
    names = {id(parameter): name for name, parameter in bundle.model.named_parameters()}
    found: dict[str, Target] = {}
    modules = list(_candidates(bundle, settings))
    for pattern in settings.skip:
        if not any(fnmatchcase(name, pattern) for name, *_ in modules):
            known = [name for name, *_ in modules]
            raise StepError(
                "skip: a pattern of module names",
                f"'{pattern}', which fits none{nearest(pattern, known)}",
                f"such as '{known[0]}'",
            )
    taken: set[str] = set()
    for name, module, grid, part in modules:
        parameter = names[id(module.weight)]
        if parameter not in taken and not any(fnmatchcase(name, pattern) for pattern in settings.skip):
            taken.add(parameter)
            found[name] = Target(parameter, name, module, grid, part)
    if not found:
        raise StepError("something to quantize", "no module left by skip and embeddings", "narrow the skip patterns")
    for target in found.values():
        _check(target)
    return found


def _candidates(bundle: Bundle, settings: QuantizeSettings) -> Iterator[tuple[str, nn.Module, Grid, str]]:
    """Tables, linears of the blocks, other linears."""
    scheme: Literal["symmetric", "asymmetric"] = "asymmetric" if settings.scheme == "asymmetric" else "symmetric"
    tables = surgery.embeddings(bundle.model, bundle.family)
    if settings.embeddings is not None:
        bits = settings.embeddings
        for name, module in tables.items():
            yield name, module, Grid(bits, "binary" if bits == 1 else scheme, "channel"), "table"
    linears = surgery.linears(bundle.model, bundle.family)
    for name, module in linears.items():
        bits = min(settings.bits, widest(settings))
        yield name, module, Grid(bits, settings.scheme, settings.granularity, settings.group_size), "block"
    tied = {id(module.weight) for module in tables.values()}
    for name, module in bundle.model.named_modules():
        other = isinstance(module, surgery.LINEARS) and name not in linears and id(module.weight) not in tied
        if other and surgery.weight_2d(module).numel():  # none is left of parts that are gone
            yield name, module, Grid(min(HEAD_BITS, widest(settings)), scheme, "channel"), "head"


def _check(target: Target) -> None:
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


def relative_error(value: Tensor, weight: Tensor) -> float:
    return float((value - weight).norm() / weight.norm().clamp(min=1e-30))


def stored_bits(codes: Mapping[str, Codes]) -> int:
    """Bits that the codes take on disk, scales and all other parts included (masks left out)."""
    from flyweight.models.bundle import OPTIONAL

    total = 0
    for one in codes.values():
        parts = (one.scale, *(getattr(one, part) for part in OPTIONAL))
        total += one.codes.numel() * one.info.bits + sum(
            8 * p.numel() * p.element_size() for p in parts if p is not None
        )
    return total
