"""Rounding learned block by block: sign gradient descent on what each block answers (Cheng et al. 2023, SignRound; the aim is
that of Nagel et al. 2020, AdaRound, and Li et al. 2021, BRECQ).

For a weight W with scale s, an offset V in [-0.5, 0.5] for every weight and factors a, b in [0.5, 1.5] for both ends of every
scale's range are learned (symmetric grids: one factor):

    W' = s (clamp(round(W / s + V) + z) - z)         loss = mean (block with W' (inputs) - what the float block answered)^2
    V, a, b -= rate sign(gradient),                  rate falls linearly from 1 / iterations to 0

Gradients pass through the rounding as if it were not there. Inputs are those that the quantized blocks before give, so a
block also makes up for what these have lost. Where a block starts from is measured: plain rounding, or GPTQ, whose corrected
weights and scales then stand for W and s. The best rounding seen on all texts is kept, so no block ends worse than by
rounding to nearest or by GPTQ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flyweight.calibration import walk
from flyweight.methods.quantize.gptq import factor, solved
from flyweight.methods.quantize.grid import Grid, codes_at, limits
from flyweight.methods.quantize.kept import Kept, codes_of, parts_of
from flyweight.methods.quantize.solving import Moments, texts
from flyweight.models.codes import expand

if TYPE_CHECKING:
    from flyweight.calibration import Block
    from flyweight.methods.quantize.work import Target, Work
    from flyweight.models.bundle import Codes

__all__ = ["Rounding", "descend", "reconstruct"]

TEXTS = 16
"""Texts a step, at least."""
LOOKS = 10
"""Times that the rounding so far is measured on all texts."""
SPAN = (0.5, 1.5)
"""Of the factors of a range's ends."""


def reconstruct(work: Work) -> None:
    """Put codes for all linears of the blocks. Raises StepError as `gptq` does, StorageError.

    A run that was killed goes on after the last block that was done.
    """
    generator = torch.Generator().manual_seed(work.context.seed)
    for block in walk(work.bundle, texts(work), work.context.progress, "reconstructing", wanted=True):
        targets = [target for site in block.sites for target in work.at(site)]
        if not targets:
            continue
        kept = Kept(work, "reconstruct", block)
        if kept.state is None:
            codes, told = _solve(work, block, targets, generator)
            parts = {name: parts_of(one) for name, one in codes.items()}
            kept.keep({"codes": parts, "told": told, "generator": generator.get_state()})
        else:
            codes = {name: codes_of(parts, work.bundle.device) for name, parts in kept.state["codes"].items()}
            told = kept.state["told"]
            generator.set_state(kept.state["generator"])
        for target in targets:
            work.put(target, codes[target.module])
        work.notes.setdefault("block_error", {})[block.name] = told


def _solve(
    work: Work, block: Block, targets: Sequence[Target], generator: torch.Generator
) -> tuple[dict[str, Codes], dict[str, Any]]:
    """(codes by module name, errors of the block's output for the record)"""
    starts = {"nearest": {target.module: Rounding.nearest(work, target) for target in targets}}
    starts["gptq"] = _by_gptq(work, block)
    paths = {target.module: target.parameter.removeprefix(f"{block.name}.") for target in targets}
    errors = {}
    for name, roundings in starts.items():
        with torch.no_grad():
            errors[name] = float(block_error(block, values_of(roundings, paths)))
    start = min(starts, key=lambda name: errors[name])
    codes, least = descend(block, starts[start], paths, errors[start], work.settings.iterations, generator)
    whole = sum(float((one**2).sum()) for one in block.wanted) / sum(one.numel() for one in block.wanted)
    told = {name: round((one / max(whole, 1e-30)) ** 0.5, 6) for name, one in {**errors, "now": least}.items()}
    return codes, {**told, "start": start}


def _by_gptq(work: Work, block: Block) -> dict[str, Rounding]:
    """GPTQ on the block's sites, each seeing the errors of those before; its codes are left in the model."""
    found = {}
    for site in block.sites:
        targets = work.at(site)
        if not targets:
            continue
        gram = Moments.seen(block, site, work.bundle.device).gram(site.name)
        made = factor(gram, work.settings.damping, site.name)
        for target in targets:
            codes, corrected = solved(work, target, made)
            work.put(target, codes)
            found[target.module] = Rounding(corrected, target.grid, codes)
    return found


class _Round(torch.autograd.Function):
    """Rounding whose gradient is one (Bengio et al. 2013); exact, which x + (round(x) - x) is not."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.round()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


class Rounding:
    """The rounding of one weight while it is learned.

    weight: [out, in], W; start: codes with its scale, zero-point and mask
    offset: [out, in], V; low, high: as the scale, a and b; all three are changed in place
    """

    def __init__(self, weight: Tensor, grid: Grid, start: Codes) -> None:
        self.weight, self.grid, self.start = weight, grid, start
        self.offset = torch.zeros_like(weight, requires_grad=True)
        self.low = torch.ones_like(start.scale, requires_grad=True)
        self.high = torch.ones_like(start.scale, requires_grad=True)

    @classmethod
    def nearest(cls, work: Work, target: Target) -> Rounding:
        return cls(work.weight(target).clone(), target.grid, work.rounded(target))

    @property
    def learned(self) -> list[Tensor]:
        return [self.offset, self.high] if self.start.zero_point is None else [self.offset, self.low, self.high]

    def value(self) -> Tensor:
        """W' [out, in], with gradients; exactly what `codes` stand for."""
        steps, scale, zero = self._grid()
        first, last = limits(self.grid)
        point = 0 if zero is None else expand(zero, self.grid)
        found = ((_rounded(steps) + point).clamp(first, last) - point) * expand(scale, self.grid)
        return found if self.start.mask is None else found * self.start.mask

    @torch.no_grad()
    def codes(self) -> Codes:
        steps, scale, zero = self._grid()
        zero_point = None if zero is None else zero.to(torch.uint8)
        return codes_at(steps, self.grid, scale, zero_point, self.start.mask, self.start.info.transposed)

    @torch.no_grad()
    def move(self, gradients: Sequence[Tensor], rate: float) -> None:
        for tensor, gradient in zip(self.learned, gradients, strict=True):
            tensor -= rate * gradient.sign()
        self.offset.clamp_(-0.5, 0.5)
        self.low.clamp_(*SPAN)
        self.high.clamp_(*SPAN)

    def _grid(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(weights in steps, scale, zero-point): the start's range with its ends moved."""
        start, top = self.start, limits(self.grid)[1]
        if start.zero_point is None:
            scale, zero = start.scale * self.high, None
        else:
            points = start.zero_point.to(start.scale.dtype)
            low, high = -points * start.scale * self.low, (top - points) * start.scale * self.high
            scale = (high - low) / top
            zero = _rounded(-low / scale).clamp(0, top)
        return self.weight / expand(scale, self.grid) + self.offset, scale, zero


def descend(
    block: Block,
    roundings: Mapping[str, Rounding],
    paths: Mapping[str, str],
    error: float,
    iterations: int,
    generator: torch.Generator,
) -> tuple[dict[str, Codes], float]:
    """({module: codes}, error of the block's output): the best of the start, whose error is given, and what is learned from it.

    paths: {module: name of its weight in the block}
    """
    best, least = {name: rounding.codes() for name, rounding in roundings.items()}, error
    looks = {round(iterations * (k + 1) / LOOKS) for k in range(LOOKS)}
    sizes = torch.tensor([float(len(hidden)) for hidden in block.inputs])
    for step in range(iterations):
        values = values_of(roundings, paths)
        loss = block_error(block, values, _draw(sizes, generator))
        learned = [tensor for rounding in roundings.values() for tensor in rounding.learned]
        gradients = iter(torch.autograd.grad(loss, learned))
        for rounding in roundings.values():
            rounding.move([next(gradients) for _ in rounding.learned], (1 - step / iterations) / iterations)
        if step + 1 in looks:
            with torch.no_grad():
                now = float(block_error(block, values_of(roundings, paths)))
            if now < least:
                best, least = {name: rounding.codes() for name, rounding in roundings.items()}, now
    return best, least


def values_of(roundings: Mapping[str, Rounding], paths: Mapping[str, str]) -> dict[str, Tensor]:
    """{name of a weight in the block: its value in the module's own layout}."""
    found = {}
    for name, rounding in roundings.items():
        value = rounding.value()
        found[paths[name]] = value.t() if rounding.start.info.transposed else value
    return found


def block_error(block: Block, values: Mapping[str, Tensor], batches: Sequence[int] | None = None) -> Tensor:
    """Mean squared difference to what the float block answered, with these weights, over these batches (by default all)."""
    changed = replace(block, module=_With(block.module, values))
    total, count = torch.zeros((), device=block.inputs[0].device), 0
    for batch in range(len(block.inputs)) if batches is None else batches:
        wanted = block.wanted[batch]
        total = total + ((changed.run(batch) - wanted) ** 2).sum()
        count += wanted.numel()
    return total / count


class _With(nn.Module):
    """A module that computes with other weights."""

    def __init__(self, module: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module, self.values = module, dict(values)

    def forward(self, *given: Any, **named: Any) -> Any:
        return functional_call(self.module, self.values, given, named)


def _rounded(value: Tensor) -> Tensor:
    found: Tensor = _Round.apply(value)  # type: ignore[no-untyped-call]
    return found


def _draw(sizes: Tensor, generator: torch.Generator) -> list[int]:
    """Batches at random, larger ones more often, until there are TEXTS texts."""
    found: list[int] = []
    for batch in torch.multinomial(sizes, len(sizes), generator=generator).tolist():
        found.append(batch)
        if sizes[found].sum() >= TEXTS:
            break
    return found
