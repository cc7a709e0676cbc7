"""AWQ: input channels that carry much are scaled up before rounding, so that rounding harms them less (Lin et al. 2024).

With s above zero for every input channel, W x = (W diag(s)) (x / s); only the first factor is rounded. Section 3.2, eq. 4 and 5:

    s = mean|x|^a, a in 0 .. 0.95 by 0.05; also over mean(|W| / max|W| of its group)^(1-a); geometric middle of extremes = 1

The s is taken that leaves the least error in the outputs of all linears reading these inputs, relative to their size;
a = 0 of the first form is no scaling. Then every group's range is cut off where its own output error is least, linear by
linear and only if the whole linear gains. So no linear's site is ever worse than by rounding to nearest.

Where something makes these inputs and nothing else (`folding`), 1/s goes there. Otherwise s stays with the codes
(`Codes.smooth`) and the input is divided at run time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from flyweight.calibration import walk
from flyweight.methods.quantize.folding import fold, source_of
from flyweight.methods.quantize.grid import Grid, codes_at, quantize_weight, units
from flyweight.methods.quantize.solving import Moments, cut_scales, error, gram_cost, lost, note, texts
from flyweight.models.codes import dequantize, expand

if TYPE_CHECKING:
    from flyweight.calibration import Block, Site
    from flyweight.methods.quantize.work import Work
    from flyweight.models.bundle import Codes

__all__ = ["Part", "awq", "candidates", "cut", "factors_of"]

POINTS = 20


class Part(NamedTuple):
    """One linear of a site: weight [out, in], mask or None."""

    weight: Tensor
    grid: Grid
    mask: Tensor | None


def awq(work: Work) -> None:
    """Put codes for all linears of the blocks. Raises StepError: no texts, NaN or inf in activations."""
    for block in walk(work.bundle, texts(work), work.context.progress, "scaling channels"):
        for site in block.sites:
            if work.at(site):
                _solve(work, block, site)


def _solve(work: Work, block: Block, site: Site) -> None:
    moments = Moments.seen(block, site, work.bundle.device)
    gram, targets = moments.gram(site.name).float(), work.at(site)
    parts = [Part(work.weight(target).clone(), target.grid, work.mask(target)) for target in targets]
    before = [error(quantize_weight(*part), part.weight, gram) for part in parts]
    factors = factors_of(parts, moments.mean_size, gram)
    smooth = factors
    if factors is not None and (source := source_of(work, block, site)) is not None:
        fold(work, site, source, factors)
        work.notes.setdefault("folded", []).append(site.name)
        smooth = None
    scaled = gram if factors is None else gram / torch.outer(factors, factors)
    for target, part, nearest in zip(targets, parts, before, strict=True):
        weight = part.weight if factors is None else part.weight * factors
        codes = cut(part._replace(weight=weight), scaled, target.transposed)
        note(work, target, nearest, error(codes, weight, scaled))
        work.put(target, replace(codes, smooth=None if smooth is None else smooth.clone()))  # stored one by one


def factors_of(parts: Sequence[Part], sizes: Tensor, gram: Tensor) -> Tensor | None:
    """s [in] for linears that read one tensor, or None where none of the candidates is better than rounding as it is.

    sizes: mean|x| [in]; gram: mean of x x^T [in, in]
    """
    wholes = [max(lost(part.weight, gram), 1e-30) for part in parts]

    def harm(factors: Tensor | None) -> float:
        found = 0.0
        for part, whole in zip(parts, wholes, strict=True):
            scaled = part.weight if factors is None else part.weight * factors
            value = dequantize(quantize_weight(scaled, part.grid, part.mask))
            found += lost((value if factors is None else value / factors) - part.weight, gram) / whole
        return found

    best, least = None, harm(None)
    for factors in candidates(parts, sizes):
        if (found := harm(factors)) < least:
            best, least = factors, found
    return best


def candidates(parts: Sequence[Part], sizes: Tensor) -> Iterator[Tensor]:
    """The grid of s [in] float32; inputs that are always zero get 1."""
    spread = torch.cat([_within(part) for part in parts]).mean(0).clamp(min=1e-4)
    dead = sizes == 0
    for divide in (False, True):
        for point in range(0 if divide else 1, POINTS):
            a = point / POINTS
            found = sizes.double().clamp(min=1e-12) ** a
            if divide:
                found = found / spread.double() ** (1 - a)
            live = found[~dead]
            if len(live):
                found = found / (live.max() * live.min()).sqrt()
            yield torch.where(dead, 1.0, found.clamp(1e-3, 1e3)).float()


def _within(part: Part) -> Tensor:
    """|W| / max|W| of what shares its scale, [out, in]."""
    size = units(part.weight.abs(), part.grid)
    return (size / size.amax(1, keepdim=True).clamp(min=1e-12)).reshape(part.weight.shape)


def cut(part: Part, gram: Tensor, transposed: bool = False) -> Codes:
    """Codes on cut-off ranges, or on the whole ones where the linear's output is better with these."""
    weight, grid, mask = part
    whole = quantize_weight(weight, grid, mask, transposed)
    scale, zero_point = cut_scales(weight, grid, mask, gram_cost(gram, grid))
    found = codes_at(weight / expand(scale, grid), grid, scale, zero_point, mask, transposed)
    return min(found, whole, key=lambda codes: lost(dequantize(codes) - weight, gram))
