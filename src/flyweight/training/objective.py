"""What a gradient method brings to the loop, and the parts that several methods share."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.models.bundle import Bundle
from flyweight.settings import TrainSettings
from flyweight.tasks import task_named

__all__ = ["Loss", "Objective", "TaskObjective", "answer", "keep_zeros", "parameter_groups"]


class Loss(Protocol):
    """The half of an objective that needs no optimizer."""

    def loss(self, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        """Mean loss over the batch, a scalar.

        batch:   input_ids, attention_mask, token_type_ids [batch, length], labels [batch] where the data have them
        indices: which examples these are, for what the objective keeps by example (a teacher's answers)
        """


class Objective(Loss, Protocol):
    """One gradient method.

    Parameters in a group that the model does not have are the objective's own (projections, multipliers): the loop
    moves, trains and checkpoints them as well.
    """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW; a group's own `lr` is its peak and follows the schedule."""

    def after_step(self, step: int, total: int) -> None:
        """Called after optimizer step `step` (from 1) of `total`, before any evaluation or checkpoint."""

    def state_dict(self) -> dict[str, Any]:
        """Further state: tensors and plain values. What it is at the start tells checkpoints of other work apart."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def parameter_groups(module: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """All trainable parameters; those with one dimension (biases, norms) are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = (
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    )
    return [{**group, "lr": settings.learning_rate} for group in groups if group["params"]]


def answer(bundle: Bundle, batch: dict[str, Tensor]) -> Tensor:
    """The task's answer of the model to a batch, float32 [batch, ...]."""
    output = bundle.model(**{name: batch[name] for name in bundle.family.inputs})
    return task_named(bundle.task).answer(output, batch)


class TaskObjective:
    """The task's own loss against the labels."""

    def __init__(self, bundle: Bundle, settings: TrainSettings) -> None:
        self.bundle, self.settings, self.task = bundle, settings, task_named(bundle.task)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(self.bundle.model, self.settings)

    def loss(self, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        return self.task.loss(answer(self.bundle, batch), batch["labels"])

    def after_step(self, step: int, total: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@contextlib.contextmanager
def keep_zeros(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """While inside, weights of the named parameters that are zero now stay exactly zero under `train`.

    Their gradients are zeroed as they arrive, so that AdamW's moments stay zero too and its step, decay included, moves
    them by nothing. Zeroing after the step instead would leave moments that keep on pushing.
    """
    hooks = []
    for name in names:
        parameter = model.get_parameter(name)
        pruned = parameter.detach() == 0

        def zero(gradient: Tensor, pruned: Tensor = pruned) -> Tensor:
            return gradient.masked_fill(pruned.to(gradient.device), 0.0)

        if parameter.requires_grad:
            hooks.append(parameter.register_hook(zero))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
