"""What a task is. A task file has two halves: one in torch (make a model, loss), one without (decode, metrics, shapes)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flyweight.data import Examples, Row
from flyweight.tokenization import Encoder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Array", "Task"]

Array = NDArray[np.float32]


class Task(Protocol):
    """One kind of work.

    name:      as on the command line
    labelled:  whether examples need labels for training and quality
    auto:      name of the transformers class that builds a model with the task's head
    output:    field of the model's output that is the answer; also the name of the engine's output
    metric:    the main metric, higher is better
    """

    name: str
    labelled: bool
    auto: str
    output: str
    metric: str

    # without torch
    def label_names(self, found: Iterable[Any]) -> tuple[str, ...] | None:
        """The classes in the data, sorted. Raises DataError for a single class."""

    def encode(self, rows: Iterable[Row], encoder: Encoder, labels: Sequence[str] | None) -> Examples:
        """Tokenize rows and turn labels into numbers. Raises DataError naming the row of an unknown label."""

    def scores(self, outputs: Array, examples: Examples) -> Array:
        """One number an example whose mean is the main metric, [n]; what paired intervals are made of."""

    def metrics(self, outputs: Array, examples: Examples) -> dict[str, float]:
        """All metrics, each in 0..1."""

    def decode(self, outputs: Array, labels: Sequence[str] | None) -> list[Any]:
        """Outputs [n, ...] -> JSON answers, one an input, as the service and `predict` give them."""

    # torch
    def answer(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        """What the engine returns, from the model's output object: float32 [batch, ...]."""

    def loss(self, answer: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over the batch against hard labels, a scalar."""
