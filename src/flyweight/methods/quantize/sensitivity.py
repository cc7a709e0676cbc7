"""What rounding one layer does: how far it moves the output of its block.

    error = |block(x; rounded) - block(x)|^2 / |block(x)|^2

over the calibration texts, with everything else in float and biases as they were. All blocks of a stack write into one residual
stream, so this is a share of the same thing everywhere, and it holds what the rest of the block makes of the error. The error of
the linear's own output, |X (W - W_q)^T|^2 / |X W^T|^2, holds neither: much of a key projection's output is without effect.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from flyweight.calibration import walk
from flyweight.methods.quantize.ladder import corrected, stand
from flyweight.models.activations import rounding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from flyweight.calibration import Block
    from flyweight.data import Examples
    from flyweight.methods.quantize.work import Target, Work
    from flyweight.models.bundle import Codes

__all__ = ["TEXTS", "chosen", "moved", "site_errors"]

TEXTS = 64  # errors of layers settle long before a solver's Hessians do


def chosen(number: int, most: int, seed: int) -> NDArray[np.int64]:
    """Which `most` of `number` examples are looked at, ascending; all where there are no more."""
    if number <= most:
        return np.arange(number)
    return np.sort(np.random.default_rng(seed).choice(number, most, replace=False))


def moved(
    work: Work, block: Block, codes: Mapping[str, Codes], biases: Mapping[str, Tensor] = MappingProxyType({})
) -> float:
    """The error of the block's output with the targets named by module rounded as `codes` say, inputs included.

    The targets are in float before and after. biases: those that were corrected for the codes, by module name
    """
    targets = [work.targets[name] for name in codes]
    with torch.no_grad(), ExitStack() as stack:
        for target in targets:
            stack.enter_context(_put(work, target, codes[target.module], biases.get(target.module)))
        error = whole = 0.0
        for batch, wanted in enumerate(block.wanted):
            error += float((block.run(batch) - wanted).double().square().sum())
            whole += float(wanted.double().square().sum())
    return error / max(whole, 1e-30)


def _put(work: Work, target: Target, codes: Codes, bias: Tensor | None) -> ExitStack:
    stack = ExitStack()
    stand(work, target, codes, bias)
    stack.callback(stand, work, target, None, work.biases.get(target.module))
    stack.enter_context(rounding(target.owner, codes, work.settings.activations))
    return stack


def site_errors(work: Work, examples: Examples) -> dict[tuple[str, ...], float]:
    """{module names of a site's targets: error} of what was put, site by site, in order of execution."""
    made = {
        target.module: work.codes[target.parameter]
        for target in work.targets.values()
        if target.parameter in work.codes
    }
    held = [work.targets[name] for name in made]
    biases = corrected(work, held)
    for target in held:
        stand(work, target, None, work.biases.get(target.module))
    found = {}
    few = examples.take(chosen(len(examples), TEXTS, work.context.seed))
    try:
        for block in walk(work.bundle, few, work.context.progress, "gate: output errors", wanted=True):
            for site in block.sites:
                names = tuple(target.module for target in work.at(site) if target.module in made)
                if names:
                    found[names] = moved(work, block, {name: made[name] for name in names}, biases)
    finally:
        for target in held:
            stand(work, target, made[target.module], biases.get(target.module))
    return found
