"""Gradients without an optimizer: what Taylor scores (Molchanov et al. 2017) and Fisher information are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.errors import TrainingError
from flyweight.training.batches import tensors
from flyweight.training.device import evaluating
from flyweight.training.objective import Loss

__all__ = ["accumulate"]

Each = Callable[[dict[str, Tensor], NDArray[np.int64]], None]


def accumulate(
    model: nn.Module,
    objective: Loss,
    data: Examples,
    each: Each,
    *,
    pad: int,
    batch_size: int = 32,
    names: Collection[str] | None = None,
    progress: Progress | None = None,
    what: str = "gradients",
) -> float:
    """Visit the examples in order, batch after batch, and hand each batch's gradients to `each`. Returns the mean loss.

    each:       called with ({parameter name: gradient of the batch's mean loss}, indices); the tensors are its to keep.
                Parameters that the loss does not reach are missing. batch_size 1 gives per-example gradients.
    names:      parameters whose gradients are wanted; by default all

    Runs where the model is, in eval mode. Mode, `requires_grad` and `.grad` are put back as they were, on errors too.
    Raises TrainingError when a loss is not a finite number.
    """
    device = next(model.parameters()).device
    batches = [np.arange(i, min(i + batch_size, len(data))) for i in range(0, len(data), batch_size)]
    total = 0.0
    with evaluating(model), _only(model, names) as wanted:
        for indices in (progress or NoProgress()).track(batches, what, total=len(batches)):
            loss = objective.loss(tensors(data, indices, pad, device), indices)
            value = float(loss.detach())
            if not np.isfinite(value):
                raise TrainingError(
                    f"a finite loss on examples {indices[0]} to {indices[-1]}", f"{value}", "check the model"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            found = {name: parameter.grad for name, parameter in wanted.items() if parameter.grad is not None}
            for parameter in wanted.values():
                parameter.grad = None
            each(found, indices)
            total += value * len(indices)
    return total / max(len(data), 1)


@contextlib.contextmanager
def _only(model: nn.Module, names: Collection[str] | None) -> Iterator[dict[str, nn.Parameter]]:
    """Gradients of the named parameters alone; what was there before is put back."""
    parameters = dict(model.named_parameters())
    wanted = parameters if names is None else {name: parameters[name] for name in names}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters.values()]
    try:
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(name in wanted)
        yield wanted
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
