"""Accuracy with its interval, and paired differences, from one score an example: by the package's own bootstrap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from flyweight.artifact import Measurement
from flyweight.data import pack
from flyweight.measure.quality import difference, quality, resamples
from flyweight.tasks.text_classification import TASK

METRIC = f"quality.{TASK.metric}"


def _as_outputs(right: ArrayLike) -> tuple[np.ndarray, object]:
    """Right answers as the outputs of a model of two classes whose examples all belong to class 1."""
    marks = np.asarray(right, np.float32)
    examples = pack([([0], None)] * len(marks), np.ones(len(marks), np.int64).tolist())
    return np.stack([1 - marks, marks], axis=1), examples


def accuracy(right: Sequence[float] | np.ndarray) -> dict[str, Measurement]:
    """`quality.accuracy` with a bootstrap 95 % interval. right: [n] of 0 and 1."""
    outputs, examples = _as_outputs(right)
    return {METRIC: quality(TASK, outputs, examples, resamples(TASK, outputs, examples))[METRIC]}


def paired(right: Sequence[float], other: Sequence[float], name: str) -> Measurement:
    """Accuracy minus that of the row called `name`, on the same examples and the same resamples."""
    if len(right) != len(other):
        raise SystemExit(
            f"error: expected scores of the same {len(other)} examples as {name}, got {len(right)}; run again"
        )
    outputs, examples = _as_outputs(right)
    outputs2, examples2 = _as_outputs(other)
    sampled, sampled2 = resamples(TASK, outputs, examples), resamples(TASK, outputs2, examples2)
    of, to = quality(TASK, outputs, examples, sampled), quality(TASK, outputs2, examples2, sampled2)
    return difference(of, to, sampled, sampled2, name)[f"{METRIC}.difference"]
