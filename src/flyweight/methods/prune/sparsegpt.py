"""SparseGPT: weights go column by column, and those of later columns make up for them (Frantar and Alistarh 2023).

With the Hessian of a layer's squared output error and U as in `flyweight.hessian.factor`, columns in their own order
(section 3, algorithm 1):

    score of w_j = w_j^2 / U_jj^2       a weight that goes leaves  e = w_j / U_jj       w_k -= e U_jk  for all k > j

What goes is chosen late, by the weights as corrected so far: over the next 128 columns and all rows at once (section 3.2,
"adaptive mask selection"), or N of every M in a row when their turn comes. Weights that are zero already go first and
stay zero; of those whose input is always zero nothing is lost, and they come next.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from flyweight.calibration import Site, calibrate
from flyweight.context import Progress
from flyweight.data import Examples
from flyweight.hessian import Factor, Moments, factor, relative, sweep
from flyweight.methods.prune.masks import check, counts, n_and_m, n_of_m, smallest, views
from flyweight.models import surgery
from flyweight.models.bundle import Bundle

__all__ = ["Solver", "corrected", "sparsegpt"]

CHOSEN = 128
"""Columns whose weights are weighed against one another (section 4: "Bs = 128")."""
COLUMNS = 32
"""N:M: about so many columns are corrected one by one before the rest is corrected at once."""


def sparsegpt(
    bundle: Bundle,
    texts: Examples,
    names: Collection[str],
    *,
    share: float | None = None,
    pattern: str = "unstructured",
    damping: float = 0.01,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Zero weights of the blocks' linears in place and correct the rest; every block sees the pruned ones before it.

    names:   parameters to prune (`encoder.layer.0.output.dense.weight`); the pattern fits all of them (`masks.fitting`)
    share:   of each of them to zero, exactly round(share * n) unless more is zero already; None with a pattern N:M

    Returns for the notes: `output_error`, {module: {"uncorrected": ..., "now": ...}}, relative, of the same mask without and
    with correction; `damping` of layers that needed more. Raises StepError: no texts, NaN or inf in activations or weights, a
    Hessian that no damping makes positive definite, a share of nothing or of everything (layer named).
    """
    solver = Solver(names, share, pattern, damping, bundle.device)
    check(views(bundle, names), share, pattern)
    calibrate(bundle, texts, solver, progress)
    return solver.notes


class Solver:
    """For `calibration.calibrate`; linears of a site share one Hessian."""

    def __init__(
        self, names: Collection[str], share: float | None, pattern: str, damping: float, device: torch.device
    ) -> None:
        self.names, self.share, self.pattern, self.damping, self.device = names, share, pattern, damping, device
        self.notes: dict[str, Any] = {"output_error": {}}

    def make(self, site: Site) -> Moments | None:
        return Moments.of(site, self.device) if any(f"{name}.weight" in self.names for name in site.linears) else None

    def accumulate(self, state: Moments | None, inputs: Tensor) -> None:
        if state is not None:
            state.add(inputs)

    @torch.no_grad()
    def solve(self, site: Site, state: Moments | None) -> None:
        if state is None:
            return
        gram = state.gram(site.name)
        made = factor(gram, self.damping, site.name, sort=False)
        if made.damping > self.damping:
            self.notes.setdefault("damping", {})[site.name] = made.damping
        for name, module in site.linears.items():
            if f"{name}.weight" not in self.names:
                continue
            weight = surgery.weight_2d(module)
            now = corrected(weight, made, gram.diagonal() == 0, self.share, self.pattern)
            self.notes["output_error"][name] = {
                "uncorrected": round(relative(weight * (now == 0), weight, gram), 6),
                "now": round(relative(now - weight, weight, gram), 6),
            }
            weight.copy_(now)


def corrected(weight: Tensor, made: Factor, dead: Tensor, share: float | None, pattern: str = "unstructured") -> Tensor:
    """The pruned weight [out, in], of the same type.

    made: the factor of the inputs' Hessian, columns as they stand; dead: [in] bool, inputs that are always zero
    """
    parts = n_and_m(pattern)
    # [in, out], and so in memory as well: a column is then contiguous
    left = weight.t().to(made.upper.dtype, copy=True, memory_format=torch.contiguous_format)
    zero, gone = left == 0, torch.zeros(left.shape, dtype=torch.bool, device=left.device)
    precision = torch.where(dead, 0, made.upper.diagonal() ** -2)[:, None]
    # What is zero already counts, wherever it is; the rest of the share is spread over all that could go.
    free, met, went = int((~zero).sum()), 0, 0
    rest = max(counts(left.numel(), share or 0.0) - int(zero.sum()), 0) / max(free, 1)

    def choose(start: int, end: int) -> None:
        nonlocal met, went
        scores = (left[start:end] ** 2 * precision[start:end]).masked_fill_(zero[start:end], -1.0)
        if parts is not None:
            gone[start:end] = ~n_of_m(scores.t(), *parts).t() | zero[start:end]
            return
        already = int(zero[start:end].sum())
        met += scores.numel() - already
        go = counts(met, rest) - went
        gone[start:end] = smallest(scores, already + go)
        went += go

    chosen = CHOSEN if parts is None else parts[1]

    def settle(j: int) -> Tensor:
        if j % chosen == 0:
            choose(j, min(j + chosen, len(left)))
        return left[j].masked_fill(gone[j], 0.0)

    sweep(left, made.upper, settle, chosen * max(1, COLUMNS // chosen))
    return left.masked_fill_(gone, 0.0).t().to(weight.dtype)
