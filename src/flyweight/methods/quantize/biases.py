"""Bias correction: the mean error of a linear's output goes into its bias (Nagel et al. 2019, section 4.2)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flyweight.calibration import walk
from flyweight.methods.quantize.solving import texts
from flyweight.models.activations import rounding

if TYPE_CHECKING:
    from flyweight.methods.quantize.work import Target, Work

__all__ = ["correct_biases"]


def correct_biases(work: Work) -> None:
    """b += E[W x] - E[W' x'] for every linear of the blocks that has a bias, over the tokens of the calibration texts.

    W is the float weight; W' and x' are as the engine multiplies them, and x carries the errors of what comes before. Raises
    StepError without texts.
    """
    activations = work.settings.activations
    with ExitStack() as hooks:
        for block in walk(work.bundle, texts(work), work.context.progress, "correcting biases"):
            for site in block.sites:
                targets = [target for target in work.at(site) if target.parameter in work.codes]
                biased = [target for target in targets if isinstance(target.owner.bias, nn.Parameter)]
                for target, shift in zip(biased, _mean_errors(work, biased, block.stream(site)), strict=True):
                    with torch.no_grad():
                        target.owner.get_parameter("bias").add_(shift)
                for target in targets:
                    hooks.enter_context(rounding(target.owner, work.codes[target.parameter], activations))


def _mean_errors(work: Work, targets: list[Target], stream: Iterable[Tensor]) -> list[Tensor]:
    """Float output less quantized output of each target, mean over tokens, [out]."""
    sums = [torch.zeros_like(target.owner.get_parameter("bias")) for target in targets]
    count = 0
    for inputs in stream if targets else ():
        count += len(inputs)
        for number, target in enumerate(targets):
            wanted = inputs @ work.weight(target).t() + target.owner.get_parameter("bias")
            with rounding(target.owner, work.codes[target.parameter], work.settings.activations), torch.no_grad():
                sums[number] += (wanted - target.owner(inputs)).sum(0).detach()
    return [total / max(count, 1) for total in sums]
