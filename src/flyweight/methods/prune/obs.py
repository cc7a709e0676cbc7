"""Structured optimal brain surgeon: groups of columns go one after another, the others make up for each (Kurtic et al. 2023).

For the linear that reads heads (groups of head_dim columns) or neurons (single ones), H the damped Hessian of its inputs and
P = H^-1 over the columns that are left, the group S goes that costs least (ZipLM, section 3.1, eq. 2 and 3):

    cost of S = tr(W_S (P_SS)^-1 W_S^T)      W -= W_S (P_SS)^-1 P_S:      P -= P_:S (P_SS)^-1 P_S:

This is exact: after any number of removals W is the best weight there is for the columns left (`restored`), the next group is
the one whose going then costs least. One column after another is slow only in how P and W are written back, so this is done
for many removals at once; until then their low-rank terms are added where a number is needed (`COLUMNS`).

Where a linear has a bias, the bias takes the mean error, and the covariance of the inputs stands for their Gram matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flyweight import hessian
from flyweight.calibration import Block, Site, walk
from flyweight.context import Progress
from flyweight.data import Examples
from flyweight.hessian import Moments
from flyweight.methods.prune.scores import Group, groups, readers
from flyweight.models import surgery
from flyweight.models.bundle import Bundle

__all__ = ["Ordered", "Seen", "columns_of", "make_up", "observed", "ordered", "restored", "score_of", "seen", "shifted"]

COLUMNS = 128
"""Columns that go before W and P are written anew."""


class Ordered(NamedTuple):
    """order: units in the order in which they go, those that stay left out; errors: relative error of the linear's output, the
    root of lost over total squares, after 0, 1, 2, ... of them went"""

    order: list[int]
    errors: list[float]


def ordered(
    weight: Tensor, gram: Tensor, size: int, damping: float, least: int = 1, name: str = "the linear"
) -> Ordered:
    """In which order the units of `size` columns go, down to `least`, and what is lost on the very inputs of `gram`.

    weight: [out, in]; gram: [in, in] float64. The damping takes part in the choice and in the correction, not in the errors.
    Raises StepError naming the layer for a Hessian that no damping makes positive definite.
    """
    units = weight.shape[1] // size
    whole = max(hessian.lost(weight.double(), gram), 1e-30)
    live = weight * (gram.diagonal() != 0)  # what reads nothing costs nothing and goes first
    left = _Left(live, hessian.inverse(gram, damping, name), size)
    order: list[int] = []
    errors = [0.0]
    while len(order) < units - least:
        for unit, lost in left.remove(min(max(1, COLUMNS // size), units - least - len(order))):
            order.append(unit)
            errors.append((max(lost, 0.0) / whole) ** 0.5)
    return Ordered(order, errors)


class _Left:
    """What is left of a linear. n: columns left; u: units left; s: columns a unit.

    units:   [u], their numbers in the whole linear
    weights: [n, out] float64, the corrected weight; floats: the same columns of the weight that it began with
    inverse: [n, n] float64, of the damped Hessian over the columns left; ridge: [n], what it was damped by
    cost:    lost by the damped Hessian so far; of it `damped`: sum of ridge_j |D_j|^2, D = all that the weight lost
    """

    def __init__(self, weight: Tensor, made: hessian.Inverse, size: int) -> None:
        self.size = size
        self.units = torch.arange(weight.shape[1] // size, device=weight.device)
        self.floats = weight.t().double().contiguous()
        self.weights = self.floats.clone()
        self.inverse, self.ridge = made.matrix, made.ridge
        self.cost = self.damped = 0.0

    def remove(self, number: int) -> list[tuple[int, float]]:
        """The next `number` units to go: (unit, lost in all after it went, by the undamped Hessian)."""
        s, u = self.size, len(self.units)
        rows = self.weights.view(u, s, -1)
        norms = rows @ rows.mT  # [u, s, s]: W_S^T W_S of every unit
        blocks = (
            self.inverse.reshape(u, s, u, s).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
        )  # P_SS of every unit
        alive = torch.ones(u, dtype=torch.bool, device=self.units.device)
        columns = self.inverse.new_zeros(u * s, number * s)  # C: P - C C^T is what is left of P
        losses = self.weights.new_zeros(self.weights.shape[1], number * s)  # A: W - A C^T is what is left of W
        nows, gone = torch.empty_like(columns), []
        for step in range(number):
            unit = int(torch.where(alive, _costs(norms, blocks), torch.inf).argmin())
            done, here = slice(0, step * s), slice(step * s, (step + 1) * s)
            column, loss = self._terms(unit, columns[:, done], losses[:, done])
            column.view(u, s, s)[~alive] = 0
            now = self.weights @ loss - columns[:, done] @ (losses[:, done].t() @ loss)  # [n, s]: W^T times the loss
            each, crossed = column.view(u, s, s), now.view(u, s, s) @ column.view(u, s, s).mT
            norms += each @ (loss.t() @ loss) @ each.mT - crossed - crossed.mT
            blocks -= each @ each.mT
            columns[:, here], losses[:, here], nows[:, here] = column, loss, now
            alive[unit], blocks[unit] = False, torch.eye(s, dtype=blocks.dtype, device=blocks.device)
            gone.append(int(self.units[unit]))
        lost = self._counted(columns, losses, nows)
        self._write_back(columns, losses, alive)
        return list(zip(gone, lost, strict=True))

    def _terms(self, unit: int, columns: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(P_:S L^-T [n, s], W_S L^-T [out, s]) with P_SS = L L^T, as P and W stand after the removals so far."""
        own = slice(unit * self.size, (unit + 1) * self.size)
        column = self.inverse[own].t() - columns @ columns[own].t()
        loss = self.weights[own].t() - losses @ columns[own].t()
        lower = torch.linalg.cholesky(column[own])
        pair = torch.linalg.solve_triangular(lower.t(), torch.cat([column, loss]), upper=True, left=False)
        return pair[: len(column)], pair[len(column) :]

    def _counted(self, columns: Tensor, losses: Tensor, nows: Tensor) -> list[float]:
        """Lost in all after each step, in which D became D - loss column^T, less what is only the damping's."""
        found, steps = [], range(0, columns.shape[1], self.size)
        moved = nows - self.floats @ losses  # D^T times the loss
        for here in (slice(start, start + self.size) for start in steps):
            column, own = columns[:, here], losses[:, here].t() @ losses[:, here]
            self.cost += float(own.trace())
            self.damped += float(self.ridge @ ((column @ own - 2 * moved[:, here]) * column).sum(1))
            found.append(self.cost - self.damped)
        return found

    def _write_back(self, columns: Tensor, losses: Tensor, alive: Tensor) -> None:
        stay = alive.repeat_interleave(self.size).nonzero()[:, 0]
        self.inverse.addmm_(columns, columns.t(), alpha=-1)
        self.inverse = self.inverse.index_select(0, stay).index_select(1, stay)
        self.weights = self.weights.addmm_(columns, losses.t(), alpha=-1)[stay]
        self.floats, self.ridge, self.units = self.floats[stay], self.ridge[stay], self.units[alive]


def _costs(norms: Tensor, blocks: Tensor) -> Tensor:
    """[units]: tr(P_SS^-1 W_S^T W_S); both [units, size, size]."""
    if norms.shape[-1] == 1:
        return (norms / blocks)[:, 0, 0]
    return torch.cholesky_solve(norms, torch.linalg.cholesky(blocks)).diagonal(dim1=1, dim2=2).sum(1)


def restored(
    weight: Tensor, gram: Tensor, keep: Sequence[int], size: int, damping: float, name: str = "the linear"
) -> Tensor:
    """The best weights of the units that stay, [out, kept columns], whatever way they were chosen: W H_:K (H_KK)^-1.

    weight: [out, in]; gram: [in, in] float64; keep: ascending. With all units it is the weight itself. Raises StepError naming
    the layer for a Hessian that no damping makes positive definite.
    """
    return hessian.best_of(weight, gram, columns_of(keep, size), damping, name)


def columns_of(keep: Sequence[int], size: int) -> list[int]:
    return [unit * size + column for unit in keep for column in range(size)]


class Seen(NamedTuple):
    """What a linear read. gram: [in, in] float64, of the inputs less their mean where a bias takes it; mean: [in] or None"""

    gram: Tensor
    mean: Tensor | None


def seen(linear: nn.Module, moments: Moments, name: str) -> Seen:
    """Raises StepError, naming the layer, where an input was NaN or inf."""
    if getattr(linear, "bias", None) is None:
        return Seen(moments.gram(name), None)
    return Seen(moments.centred(name), moments.mean)


def observed(
    bundle: Bundle,
    texts: Examples,
    target: str,
    damping: float,
    least: int = 1,
    progress: Progress | None = None,
) -> dict[Group, Ordered]:
    """For every group of heads, neurons or both (`target`) how its units go, each by the inputs that the whole model gives it.

    Nothing is changed. Raises StepError: no texts, NaN or inf in activations, a Hessian that no damping makes positive
    definite (layer named).
    """
    wanted = [group for part in target.split("+") for group in groups(bundle, part)]
    found: dict[Group, Ordered] = {}
    for block in walk(bundle, texts, progress, "scoring"):
        for site in block.sites:
            for group, (name, linear, size) in _reading(bundle, block, site, wanted).items():
                given = seen(linear, Moments.seen(block, site, bundle.device), name)
                weight = surgery.weight_2d(linear).detach()
                found[group] = ordered(weight, given.gram, size, damping, least, name)
    return {group: found[group] for group in wanted}


def score_of(found: Ordered, units: int) -> Tensor:
    """[units] float64: the relative error after a unit went, rising in the order; without bound where it stays."""
    scores = torch.full((units,), torch.inf, dtype=torch.float64)
    errors = torch.tensor(found.errors[1:], dtype=torch.float64).cummax(0).values
    scores[found.order] = errors + 1e-12 * torch.arange(len(errors))  # no two alike: whoever sorts them finds the order
    return scores


@torch.no_grad()
def make_up(
    bundle: Bundle,
    texts: Examples,
    keep: Mapping[Group, Sequence[int]],
    damping: float,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Zero the columns that read what will go, and let the others and the bias make up for it, in place, block after block: every
    linear by the inputs that the pruned model gives it. `structured.cut` then changes no answer.

    keep: units that stay, ascending, for groups of heads or neurons. Returns {group: relative error of the linear's output}.
    Raises StepError as `observed`.
    """
    errors = {}
    for block in walk(bundle, texts, progress, "making up"):
        for site in block.sites:
            for group, (name, linear, size) in _reading(bundle, block, site, list(keep)).items():
                weight = surgery.weight_2d(linear)
                if len(keep[group]) * size == weight.shape[1]:
                    continue
                given = seen(linear, Moments.seen(block, site, bundle.device), name)
                now = torch.zeros_like(weight)
                if stay := keep[group]:
                    now[:, columns_of(stay, size)] = restored(weight, given.gram, stay, size, damping, name)
                errors[str(group)] = round(hessian.relative(now - weight, weight, given.gram), 6)
                if given.mean is not None:
                    linear.get_parameter("bias").add_(shifted(weight, now, given.mean))
                weight.copy_(now)
    return errors


def shifted(weight: Tensor, now: Tensor, mean: Tensor) -> Tensor:
    """[out], what the bias gains when `weight` becomes `now`, both [out, in]: the mean error of the output is none then."""
    return ((weight.double() - now.double()) @ mean).to(weight.dtype)


def _reading(
    bundle: Bundle, block: Block, site: Site, wanted: Sequence[Group]
) -> dict[Group, tuple[str, nn.Module, int]]:
    """{group: (name, the linear that reads its units, columns a unit)} for the groups that this site's linears read."""
    names = {id(module): name for name, module in site.linears.items()}
    return {
        group: (names[id(linear)], linear, size)
        for group in wanted
        if (group.stack, group.block) == (block.stack, block.number)
        for linear, size in readers(bundle, group)
        if id(linear) in names
    }
