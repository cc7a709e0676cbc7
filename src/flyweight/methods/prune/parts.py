"""Heads and neurons out of a model: ranked, chosen by an amount or a wish, cut, and made up for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flyweight.context import NoProgress
from flyweight.errors import StepError
from flyweight.methods.prune import obs, structured
from flyweight.methods.prune.gradual import train_while_pruning
from flyweight.methods.prune.ranking import rank
from flyweight.methods.prune.restore import restore, texts
from flyweight.methods.prune.scores import Scores, groups, random, sample, score
from flyweight.methods.prune.wished import check_wish, wished
from flyweight.training import predict

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.data import Examples
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["prune_parts", "prune_while_training"]

LOOKED_AT = 128
"""Texts that the loss is measured on after every stage."""


def prune_parts(bundle: Bundle, settings: PruneSettings, context: Context) -> dict[str, Any]:
    """Cut heads, neurons or both in place, without training but for `restore: block`. Returns the step's notes:

    wish, costs: what was asked for and found, what it was counted by (`speedup`)
    kept:        {group: units}
    expected:    by how much the loss should grow, of the first choice and of the rearranged one (`fisher`)
    loss:        with `speedup` or `restore`, measured on a few texts after every stage: of the labels or, without any, the
                 squared way that answers moved
    block_error: relative error of each block's output before and after it was restored

    Raises StepError: an amount that comes to nothing or to everything, a wish that nothing meets, no texts, weights whose zeros
    restoring would fill.
    """
    _check_zeros(bundle, settings)
    sizes = groups(bundle, settings.target)
    if settings.amount is not None:
        structured.check(sizes, settings)
    if settings.criterion == "hessian" or settings.restore != "none":
        texts(settings, context)  # or it would be refused after the scores
    if settings.speedup is not None:
        check_wish(bundle, settings, context)  # the same
    measure = _measure(bundle, settings, context)
    loss = {"before": measure(bundle)} if measure else {}
    notes: dict[str, Any] = {}
    ranking = rank(bundle, settings, context)
    if settings.speedup is not None:
        keep, notes = wished(bundle, settings, context, ranking)
    else:
        assert settings.amount is not None
        keep = structured.select(ranking.scores, settings.amount, settings.scope, settings.multiple_of)
        structured.check_kept(keep, sizes, settings)
    if settings.criterion == "fisher" and settings.rearrange:
        keep, notes["expected"] = ranking.rearranged(keep)
    dense = bundle.copy() if settings.restore != "none" else None
    if settings.criterion == "hessian" and settings.restore in ("none", "masks"):
        some = texts(settings, context)
        notes["output_error"] = obs.make_up(bundle, some, keep, settings.damping, context.progress)
    notes |= structured.cut(bundle, settings.target, keep)
    notes["kept"] = {str(group): len(stay) for group, stay in keep.items()}
    loss |= {"cut": measure(bundle)} if measure else {}
    if dense is not None:
        notes["block_error"] = restore(bundle, dense, settings, context)
        loss |= {"restored": measure(bundle)} if measure else {}
    return {**notes, "loss": loss} if loss else notes


def _check_zeros(bundle: Bundle, settings: PruneSettings) -> None:
    """Columns may go, and be scaled; other weights may not take the place of zeros."""
    fills = settings.restore in ("linear", "block") or settings.criterion == "hessian"
    if bundle.sparse and fills:
        what = "criterion hessian" if settings.restore in ("none", "masks") else f"restore {settings.restore}"
        raise StepError(
            f"weights without zeros for {what}, which would fill them",
            f"{len(bundle.sparse)} pruned ones",
            "prune weights afterwards, or set restore to masks or none with another criterion",
        )


def _measure(bundle: Bundle, settings: PruneSettings, context: Context) -> Callable[[Bundle], float] | None:
    """Gives the mean loss of a model on a few texts; None without any, and where there is but one stage."""
    if settings.speedup is None and settings.restore == "none":
        return None
    some: Examples | None = next((one for one in (context.validation, context.train) if one is not None), None)
    if some is not None and some.labels is not None and context.task.labelled:
        few = sample(some, LOOKED_AT, context.seed)
        labels = torch.from_numpy(np.ascontiguousarray(few.labels))
        return lambda model: round(float(context.task.loss(torch.from_numpy(predict(model, few)), labels)), 6)
    some = context.calibration if context.calibration is not None else context.train
    if some is None or not len(some):
        return None
    rest = sample(some, LOOKED_AT, context.seed)
    answers = predict(bundle, rest)
    return lambda model: round(float(((predict(model, rest) - answers) ** 2).sum(-1).mean()), 6)


def prune_while_training(bundle: Bundle, settings: PruneSettings, context: Context) -> dict[str, Any]:
    """`gradual: cubic`: silence more and more of them while the model trains, then cut them. Returns the step's notes."""
    sizes = groups(bundle, settings.target)
    structured.check(sizes, settings)
    parts = _Parts(bundle, settings, context)
    gone, training = train_while_pruning(bundle, settings, context, parts)
    keep = {parts.by_name[name]: (~units).nonzero()[:, 0].tolist() for name, units in gone.items()}
    structured.check_kept(keep, sizes, settings)
    return {"training": training, **structured.cut(bundle, settings.target, keep)}


class _Parts:
    """Heads or neurons on their way out: silenced in training, cut at its end."""

    def __init__(self, bundle: Bundle, settings: PruneSettings, context: Context) -> None:
        self.bundle, self.settings = bundle, settings
        self.context = replace(context, progress=NoProgress())  # no bars inside the training's
        self.by_name = {str(group): group for group in groups(bundle, settings.target)}
        self.gone: dict[str, Tensor] = {}

    def choose(self, share: float) -> dict[str, Tensor]:
        found = self._scores()
        for name, units in self.gone.items():  # what is gone comes last, whatever its weights became
            found[self.by_name[name]].masked_fill_(units.cpu(), -1.0)
        keep = structured.select(found, share, self.settings.scope, self.settings.multiple_of)
        self.gone = {}
        for group, stay in keep.items():
            self.gone[str(group)] = torch.ones(len(found[group]), dtype=torch.bool)
            self.gone[str(group)][stay] = False
        return self.gone

    def _scores(self) -> Scores:
        if self.settings.criterion == "random":
            return random(self.bundle, self.settings.target, self.context.seed)
        return score(self.bundle, self.settings, self.context)

    def apply(self, gone: dict[str, Tensor]) -> None:
        self.gone = gone  # also after a resume
        structured.silence(self.bundle, {self.by_name[name]: units for name, units in gone.items()})
