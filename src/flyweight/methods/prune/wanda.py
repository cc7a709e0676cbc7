"""Wanda: a weight matters as much as its size times that of its input (Sun et al. 2024).

    score of w_ij = |w_ij| * ||x_j||_2          over all tokens (section 3, eq. 1)

Weights are weighed against those of the same output (the same row), or N of every M in it stay. Nothing is corrected: one
number an input is all that is kept of the texts. Weights that are zero already go first.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from flyweight.calibration import Site, calibrate
from flyweight.context import Progress
from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.methods.prune.masks import check, n_and_m, n_of_m, row_wise, views
from flyweight.models import surgery
from flyweight.models.bundle import Bundle

__all__ = ["Solver", "kept", "wanda"]


def wanda(
    bundle: Bundle,
    texts: Examples,
    names: Collection[str],
    *,
    share: float | None = None,
    pattern: str = "unstructured",
    progress: Progress | None = None,
) -> None:
    """Zero weights of the blocks' linears in place; every linear is judged by what the pruned ones before it give.

    names: parameters to prune (`encoder.layer.0.output.dense.weight`); the pattern fits all of them (`masks.fitting`)
    share: of each of them to zero, exactly round(share * n) unless a row has more zeros already; None with a pattern N:M

    Raises StepError: no texts, NaN or inf in activations or weights, a share of nothing or of everything (layer named).
    """
    check(views(bundle, names), share, pattern)
    calibrate(bundle, texts, Solver(names, share, pattern, bundle.device), progress)


class Solver:
    """For `calibration.calibrate`. State: sum of x^2, [in] float64."""

    def __init__(self, names: Collection[str], share: float | None, pattern: str, device: torch.device) -> None:
        self.names, self.share, self.pattern, self.device = names, share, pattern, device

    def make(self, site: Site) -> Tensor:
        return torch.zeros(site.width, dtype=torch.float64, device=self.device)

    def accumulate(self, state: Tensor, inputs: Tensor) -> None:
        state += inputs.double().square_().sum(0)

    @torch.no_grad()
    def solve(self, site: Site, state: Tensor) -> None:
        if not torch.isfinite(state).all():
            raise StepError(f"finite activations into {site.name}", "NaN or inf", "check the model and the texts")
        for name, module in site.linears.items():
            if f"{name}.weight" in self.names:
                weight = surgery.weight_2d(module)
                weight.masked_fill_(~kept(weight, state.sqrt(), self.share, self.pattern), 0.0)


def kept(weight: Tensor, norms: Tensor, share: float | None, pattern: str = "unstructured") -> Tensor:
    """[out, in] bool, what stays of the weight; norms: [in], the L2 norm of every input over all tokens."""
    scores = (weight.abs().double() * norms).masked_fill_(weight == 0, -1.0)
    parts = n_and_m(pattern)
    if parts is not None:
        return n_of_m(scores, *parts)
    assert share is not None
    return row_wise(scores, share)
