"""Quality on labelled examples with bootstrap intervals, and the paired difference to the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyweight.artifact import Measurement
from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.engines.engine import Predictor
from flyweight.tasks.task import Array, Task

__all__ = ["RESAMPLES", "answers", "difference", "quality", "resamples"]

RESAMPLES = 2000
CHUNK = 2**21  # indices drawn at a time: 16 MB
Floats = NDArray[np.float64]
Draws = Callable[[], Iterator[NDArray[np.int64]]]


def answers(
    predictor: Predictor, examples: Examples, pad: int, batch_size: int = 32, progress: Progress | None = None
) -> Array:
    """Outputs of a predictor in the order of the examples, [n, ...]; batches are made of texts of like length."""
    progress = progress or NoProgress()
    order = np.argsort(examples.lengths, kind="stable")
    spans = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    ordered = np.concatenate(
        [predictor.run(examples.batch(span, pad)) for span in progress.track(spans, "quality", total=len(spans))]
    )
    found = np.empty_like(ordered)
    found[order] = ordered
    return found


def resamples(
    task: Task, outputs: Array, examples: Examples, seed: int = 0, number: int = RESAMPLES
) -> dict[str, Floats]:
    """{metric: its value on each of `number` bootstrap samples of the examples}, [number] float64.

    With one seed and one n the samples are the same for every model, so that differences are paired.
    """

    def draws() -> Iterator[NDArray[np.int64]]:
        n, size = len(examples), max(1, CHUNK // len(examples))
        generator = np.random.default_rng(seed)
        for start in range(0, number, size):
            yield generator.integers(0, n, (min(size, number - start), n))

    return {name: _resampled(name, task, outputs, examples, draws) for name in task.metrics(outputs, examples)}


def _resampled(name: str, task: Task, outputs: Array, examples: Examples, draws: Draws) -> Floats:
    """Fast ways for the metrics that have one; any other is taken sample by sample."""
    if name == task.metric:
        scores = task.scores(outputs, examples).astype(np.float64)
        return np.concatenate([scores[rows].mean(axis=1) for rows in draws()])
    if name == "cosine_p1":
        cosine = task.scores(outputs, examples).astype(np.float64)
        return np.concatenate([np.percentile(cosine[rows], 1, axis=1) for rows in draws()])
    if name == "macro_f1" and examples.labels is not None and outputs.ndim == 2:
        few = max(1, CHUNK // outputs.shape[1] ** 2)  # a table of classes x classes each
        parts = (rows[i : i + few] for rows in draws() for i in range(0, len(rows), few))
        return np.concatenate([_macro_f1(outputs, examples.labels, some) for some in parts])
    every = (task.metrics(outputs[row], examples.take(row))[name] for rows in draws() for row in rows)
    return np.fromiter(every, dtype=np.float64)


def _macro_f1(outputs: Array, labels: NDArray[Any], rows: NDArray[np.int64]) -> Floats:
    """As `tasks.text_classification.macro_f1`, for all resamples [samples, n] at once."""
    classes = outputs.shape[1]
    cell = labels * classes + outputs.argmax(-1)
    which = np.arange(len(rows))[:, None] * classes**2 + cell[rows]
    table = np.bincount(which.ravel(), minlength=len(rows) * classes**2).reshape(-1, classes, classes)
    right = table.diagonal(axis1=1, axis2=2)
    total = table.sum(1) + table.sum(2)
    score = np.divide(2 * right, total, out=np.zeros(total.shape), where=total > 0)
    macro: Floats = score.sum(1) / (total > 0).sum(1)
    return macro


def quality(task: Task, outputs: Array, examples: Examples, sampled: Mapping[str, Floats]) -> dict[str, Measurement]:
    """`quality.accuracy` and the like, with the percentile-bootstrap 95 % interval (Efron and Tibshirani 1993, ch. 13)."""
    how = f"held-out examples; 95 % percentile interval of {_count(sampled)} bootstrap samples"
    return {
        f"quality.{name}": _figure(value, sampled[name], len(examples), how, unit_of(name))
        for name, value in task.metrics(outputs, examples).items()
    }


def difference(
    of: Mapping[str, Measurement],
    to: Mapping[str, Measurement],
    of_sampled: Mapping[str, Floats],
    to_sampled: Mapping[str, Floats],
    name: str,
) -> dict[str, Measurement]:
    """`quality.accuracy.difference`: the model minus the one called `name`, on the same examples and the same resamples.

    of, to: what `quality` gave for both; of_sampled, to_sampled: what `resamples` gave with one seed.
    """
    how = (
        f"minus {name}, paired on the same examples; 95 % percentile interval of {_count(of_sampled)} bootstrap samples"
    )
    found = {}
    for metric in of_sampled:
        key = f"quality.{metric}"
        if metric not in to_sampled:
            continue
        value = of[key].value - to[key].value
        moved = of_sampled[metric] - to_sampled[metric]
        found[f"{key}.difference"] = _figure(value, moved, of[key].n, how, unit_of(metric))
    return found


def unit_of(metric: str) -> str:
    """Cosines lie so near to 1 that percents would hide what matters."""
    return "cosine" if metric.startswith("cosine") else "share"


def _figure(value: float, sampled: Floats, n: int | None, method: str, unit: str) -> Measurement:
    low, high = np.percentile(sampled, [2.5, 97.5])
    return Measurement(value=value, unit=unit, low=float(low), high=float(high), n=n, method=method)


def _count(sampled: Mapping[str, Floats]) -> int:
    return len(next(iter(sampled.values()), ()))
