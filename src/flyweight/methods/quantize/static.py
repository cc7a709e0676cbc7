"""Static int8 activations: every site of the blocks gets a fixed grid for its inputs, found on the user's texts.

The walk goes from site to site in order of execution; each sees inputs that carry the rounding of all sites before it, of
weights and of activations, so that a grid is fitted to what the engine will feed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from flyweight.calibration import Block, Site, walk
from flyweight.methods.quantize.folding import fold, neurons, put_first, source_of
from flyweight.methods.quantize.gptq import factor, solved
from flyweight.methods.quantize.grid import quantize_weight
from flyweight.methods.quantize.mixed import outlier_bits, reserve
from flyweight.methods.quantize.smooth import Input, Search, round_weight, some
from flyweight.methods.quantize.solving import Moments, texts
from flyweight.models import surgery
from flyweight.models.activations import rounding
from flyweight.models.codes import dequantize

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.methods.quantize.work import Target, Work
    from flyweight.models.bundle import Codes

__all__ = ["input_grids", "smooth_and_round"]

KEPT = 8192
"""Tokens of a site that are looked at."""


def smooth_and_round(work: Work) -> None:
    """Put codes with smoothing, outlier channels and input grids for all linears of the blocks.

    Smoothed weights are rounded to the nearest point, or by GPTQ on the rounded inputs. Raises StepError without texts.
    """
    settings, rows = work.settings, []
    work.keep_biases()
    for block, site, targets, inputs in _sites(work):
        whole = torch.cat([work.weight(target) for target in targets])
        source = source_of(work, block, site) if settings.smooth else None
        search = Search(inputs, whole, partial(_rounded, targets), work.context.seed, source is not None, site.name)
        how = search.best(settings.ranges, settings.smooth, _most(work, targets), _movable(work, targets))
        if work.room is not None and how.outliers is not None:
            work.room -= sum(outlier_bits(target, len(how.outliers), work) for target in targets)
        rows.append(_row(site, how))
        if source is not None and how.smooth is not None:
            fold(work, site, source, how.smooth)
            inputs, how = inputs / how.smooth, how.folded()
        ups = [] if how.outliers is None else neurons(work, block, site)
        if how.outliers is not None and ups:
            order = put_first(work, site, ups, how.outliers)
            inputs, how = inputs[:, order], how.ordered(order)
        made = None
        if settings.method == "gptq":
            moments = Moments.of(site, inputs.device)
            for part in torch.split(how.apply(inputs), 1024):
                moments.add(part)
            made = factor(moments.gram(site.name), settings.damping, site.name)
        for target in targets:
            weight = work.weight(target)
            if made is not None:
                codes = solved(work, target, made, how.weight(weight))[0]
            else:
                codes = work.rounded(target, weight=how.weight(weight))
            values = None if how.outliers is None else weight[:, how.outliers].contiguous()
            codes = replace(codes, smooth=how.smooth, outliers=how.outliers, outlier_values=values)
            _put(work, target, codes, how)
    work.notes["inputs"] = rows


def input_grids(work: Work) -> None:
    """Give input grids to codes that another method has put; its weights and smoothing stay as they are."""
    rows = []
    work.keep_biases()
    for _, site, targets, inputs in _sites(work):
        changed = [target for target in targets if target.parameter in work.codes]
        if not changed:
            continue
        smooth = work.codes[changed[0].parameter].smooth  # one for the site
        divided = inputs if smooth is None else inputs / smooth
        weights = [dequantize(work.codes[target.parameter]) for target in changed]
        whole = torch.cat(weights if smooth is None else [weight * smooth for weight in weights])
        search = Search(divided, whole, None, work.context.seed, name=site.name)
        how = search.best(work.settings.ranges, smooth=False, outliers=0, shift=_movable(work, changed))
        if how.shift is not None and smooth is not None:
            how = replace(how, shift=how.shift * smooth)
        for target in changed:
            _put(work, target, work.codes[target.parameter], how)
        rows.append(_row(site, how))
    work.notes["inputs"] = rows


def _rounded(targets: list[Target], weight: Tensor) -> Tensor:
    """[out, in], the weights of all targets one below the other, each to the nearest point of its grid."""
    grids = {target.grid for target in targets}
    first = targets[0].grid
    if len(grids) == 1 and first.granularity == "channel" and first.scheme == "symmetric" and first.bits > 1:
        return round_weight(weight, first.bits)
    parts = torch.split(weight, [len(surgery.weight_2d(target.owner)) for target in targets])
    pairs = zip(parts, targets, strict=True)
    return torch.cat([dequantize(quantize_weight(part, target.grid)) for part, target in pairs])


def _most(work: Work, targets: list[Target]) -> int:
    """Outlier channels that the site may have: within the budget, and none beside a grid that has no zero to leave one out."""
    if any(target.grid.scheme == "binary" for target in targets):
        return 0
    most = work.settings.outliers
    if work.room is None:
        return most
    work.room += sum(reserve(work, target) for target in targets)
    return min(most, work.room // sum(outlier_bits(target, 1, work) for target in targets))


def _movable(work: Work, targets: list[Target]) -> bool:
    """Whether every linear has a bias, which takes what a shift of the inputs gives."""
    return work.settings.smooth and all(isinstance(target.owner.bias, nn.Parameter) for target in targets)


def _put(work: Work, target: Target, codes: Codes, how: Input) -> None:
    """Codes with the grid of the inputs; the bias takes what a shift loses."""
    codes = replace(codes, input_scale=how.scale, input_zero_point=how.zero_point, input_shift=how.shift)
    work.put(target, codes)
    lost = work.lost(target, codes)
    if lost is not None:
        with torch.no_grad():
            target.owner.get_parameter("bias").add_(lost)


def _sites(work: Work) -> Iterator[tuple[Block, Site, list[Target], Tensor]]:
    """(block, site, its targets, what they read [tokens, in]); what was put is rounded as the engine will for all later sites."""
    with ExitStack() as hooks:
        for block in walk(work.bundle, texts(work), work.context.progress):
            for site in block.sites:
                targets = work.at(site)
                if not targets:
                    continue
                yield block, site, targets, some(torch.cat(list(block.stream(site))), KEPT, work.context.seed)
                for target in targets:
                    if (codes := work.codes.get(target.parameter)) is not None:
                        hooks.enter_context(rounding(target.owner, codes, "static"))


def _row(site: Site, how: Input) -> dict[str, object]:
    """One line of the record: what was chosen, and the error it leaves."""
    return {
        "site": site.name,
        "alpha": how.alpha,
        "centre": how.centre,
        "outliers": 0 if how.outliers is None else len(how.outliers),
        "range": how.range,
        "error": round(how.error, 6),
    }
