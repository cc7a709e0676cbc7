"""Pruning while training: the share grows by the cubic schedule, what is pruned stays zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.methods.prune.masks import RAMP, cubic_share
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings
from flyweight.training import TaskObjective, keep_zeros, train, validation

__all__ = ["Shrinking", "train_while_pruning"]

UPDATES = 100
"""How often the choice of what to prune is renewed on the way."""


class Shrinking(Protocol):
    """What is being pruned away: weights, or heads or neurons that are silenced until they are cut."""

    def choose(self, share: float) -> dict[str, Tensor]:
        """{name: bool tensor, True = gone} for a share that never falls; what was gone before stays gone."""

    def apply(self, gone: dict[str, Tensor]) -> None:
        """Zero it in the model."""


class _GradualObjective(TaskObjective):
    """The task's loss; after each step zeros what is gone, and takes more as the schedule says."""

    def __init__(self, bundle: Bundle, settings: PruneSettings, shrinking: Shrinking, expensive: bool) -> None:
        super().__init__(bundle, settings)
        assert settings.amount is not None
        self.amount, self.shrinking = settings.amount, shrinking
        self.updates = UPDATES // 10 if expensive else UPDATES
        self.gone: dict[str, Tensor] = {}
        self.share = 0.0

    @property
    def finished(self) -> bool:
        return self.share >= self.amount

    def after_step(self, step: int, total: int) -> None:
        every = max(1, math.floor(RAMP * total / self.updates))
        last = min(math.ceil(RAMP * total), total)
        if step == last or (step < last and step % every == 0):
            self.share = self.amount if step == last else cubic_share(step, total, self.amount)
            self.gone = self.shrinking.choose(self.share)
        self.shrinking.apply(self.gone)

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.share, "gone": self.gone}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.share, self.gone = state["share"], dict(state["gone"])


def train_while_pruning(
    bundle: Bundle, settings: PruneSettings, context: Context, shrinking: Shrinking
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fine-tune with the share growing to `settings.amount`. Returns (what is gone, notes of the training).

    Only evaluations after the last removal count for the best weights. Raises StepError without labelled examples or
    without a single step.
    """
    if context.train is None or context.train.labels is None or not context.task.labelled:
        raise StepError("labelled examples to train on while pruning", "none", "set gradual to one-shot")
    objective = _GradualObjective(bundle, settings, shrinking, settings.criterion == "taylor")
    evaluate: Callable[[], float] | None = validation(bundle, context.validation)
    if evaluate is not None:
        measure = evaluate
        evaluate = lambda: measure() if objective.finished else math.nan  # noqa: E731
    with keep_zeros(bundle.model, bundle.sparse):
        result = train(
            bundle.model,
            objective,
            context.train,
            settings,
            seed=context.seed,
            pad=bundle.encoder.pad,
            work=context.work,
            evaluate=evaluate,
            progress=context.progress,
            device=context.device,
            what="pruning",
            key="" if context.validation is None else context.validation.content_hash(),
        )
    if not objective.finished:
        raise StepError("at least one training step", f"{result.steps}", "raise epochs or max_steps")
    bundle.fresh_head = False
    with torch.no_grad():
        shrinking.apply(objective.gone)
    return objective.gone, result.notes()
