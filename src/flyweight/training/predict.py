"""Answers of a model in hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.models.bundle import Bundle
from flyweight.tasks import task_named
from flyweight.training.batches import by_length, tensors
from flyweight.training.device import evaluating
from flyweight.training.objective import answer

__all__ = ["outputs", "predict", "validation"]

Forward = Callable[[dict[str, Tensor]], Tensor]


def outputs(
    model: nn.Module,
    forward: Forward,
    examples: Examples,
    *,
    pad: int,
    batch_size: int = 64,
    progress: Progress | None = None,
    what: str = "predicting",
) -> NDArray[np.float32]:
    """`forward` of every example, [n, ...] float32 in the order of the examples.

    Runs where the model is, without gradients and in eval mode, in batches of like length; the mode is put back.
    """
    device = next(model.parameters()).device
    batches = by_length(examples.lengths, batch_size)
    found: NDArray[np.float32] | None = None
    with evaluating(model), torch.inference_mode():
        for indices in (progress or NoProgress()).track(batches, what, total=len(batches)):
            part = forward(tensors(examples, indices, pad, device)).float().cpu().numpy()
            if found is None:
                found = np.empty((len(examples), *part.shape[1:]), np.float32)
            found[indices] = part
    return np.empty((0,), np.float32) if found is None else found


def predict(
    bundle: Bundle,
    examples: Examples,
    *,
    batch_size: int = 64,
    progress: Progress | None = None,
    what: str = "predicting",
) -> NDArray[np.float32]:
    """The task's answers (logits, vectors, ...) of the bundle's model as it stands in torch, see `outputs`."""
    return outputs(
        bundle.model,
        lambda batch: answer(bundle, batch),
        examples,
        pad=bundle.encoder.pad,
        batch_size=batch_size,
        progress=progress,
        what=what,
    )


def validation(bundle: Bundle, examples: Examples | None) -> Callable[[], float] | None:
    """What `train` calls to evaluate: the task's main metric on `examples`; None without labelled ones."""
    if examples is None or examples.labels is None or not len(examples):
        return None
    task, some = task_named(bundle.task), examples
    return lambda: task.metrics(predict(bundle, some), some)[task.metric]
