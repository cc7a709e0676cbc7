"""What the rows of a table gave, and what is told of several rows at once: differences pooled over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.runner import Table, load, unpack_scores
from flyweight.artifact import Measurement
from flyweight.measure.quality import RESAMPLES

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """rows: {row: its record}, of those that gave something."""

    rows: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, table: Table) -> Self:
        return cls({row.name: record for row in table.rows if (record := load(table.name, row.name)) is not None})

    def figure(self, row: str, key: str) -> Measurement | None:
        found = self.rows.get(row, {}).get("figures", {}).get(key)
        return None if found is None else Measurement.model_validate(found)

    def scores(self, row: str) -> Floats | None:
        packed = self.rows.get(row, {}).get("scores")
        return None if packed is None else np.asarray(unpack_scores(packed))

    def mean_scores(self, rows: Sequence[str]) -> Floats:
        """[examples]: the mean over rows, which are those of one thing under several seeds."""
        every = [self.scores(row) for row in rows]
        mean: Floats = np.mean([scores for scores in every if scores is not None], axis=0)
        return mean

    def mean(self, rows: Sequence[str]) -> Measurement | None:
        return mean_of(self.mean_scores(rows), len(rows)) if rows else None

    def minus(self, rows: Sequence[str], others: Sequence[str]) -> Measurement | None:
        """Pair by pair, each example's difference averaged over the pairs; None where they saw other examples (a trial)."""
        if not rows:
            return None
        one, two = self.mean_scores(rows), self.mean_scores(others)
        return mean_of(one - two, len(rows)) if len(one) == len(two) else None

    def paired(self, row: str, other: str) -> Measurement | None:
        """Mean of the scores of `row` minus those of `other`, example by example."""
        one, two = self.scores(row), self.scores(other)
        return None if one is None or two is None else mean_of(one - two, 0)


def mean_of(values: Floats, seeds: int) -> Measurement:
    """With the percentile-bootstrap interval over examples (Efron and Tibshirani 1993, ch. 13); the same draws for all."""
    draws = np.random.default_rng(0)
    means = [values[draws.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    how = f"mean over examples{f' and {seeds} seeds' if seeds else ''}; 95 % percentile interval of {RESAMPLES} samples"
    return Measurement(value=float(values.mean()), unit="", low=low, high=high, n=max(1, seeds), method=how)
