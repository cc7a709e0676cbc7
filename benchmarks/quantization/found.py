"""What the rows gave, and what is told of several rows at once: differences pooled over seeds, differences within pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.quantization.classes import SEEDS, row_name
from benchmarks.quantization.models import Model
from benchmarks.runner import Table, load, unpack_scores
from flyweight.artifact import Measurement
from flyweight.measure.quality import RESAMPLES

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """rows: {row: its record}, of those that gave something."""

    rows: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, table: Table) -> Found:
        return cls({row.name: record for row in table.rows if (record := load(table.name, row.name)) is not None})

    def figure(self, row: str, key: str) -> Measurement | None:
        found = self.rows.get(row, {}).get("figures", {}).get(key)
        return None if found is None else Measurement.model_validate(found)

    def scores(self, row: str) -> Floats | None:
        packed = self.rows.get(row, {}).get("scores")
        return None if packed is None else np.asarray(unpack_scores(packed))

    def seeds(self, model: Model, key: str) -> list[int]:
        """Those for which the row and its reference were run."""
        needed = [(row_name(model, key, seed), row_name(model, "fp32", seed)) for seed in SEEDS]
        return [seed for seed, pair in zip(SEEDS, needed, strict=True) if all(name in self.rows for name in pair)]

    def pooled_scores(self, model: Model, key: str, seeds: Sequence[int]) -> Floats:
        """[examples]: the mean over the seeds."""
        every = [self.scores(row_name(model, key, seed)) for seed in seeds]
        mean: Floats = np.mean([scores for scores in every if scores is not None], axis=0)
        return mean

    def accuracy(self, model: Model, key: str) -> Measurement | None:
        seeds = self.seeds(model, key)
        return _mean(self.pooled_scores(model, key, seeds), seeds) if seeds else None

    def drop(self, model: Model, key: str) -> Measurement | None:
        """Accuracy minus that of the fp32 model of the same seed, each example's difference averaged over the seeds."""
        seeds = self.seeds(model, key)
        if not seeds:
            return None
        return _mean(self.pooled_scores(model, key, seeds) - self.pooled_scores(model, "fp32", seeds), seeds)

    def beside(self, row: str, model: Model) -> Measurement | None:
        """A row without seeds minus the fp32 model, averaged over its seeds; None where they saw other examples (a trial)."""
        scores, seeds = self.scores(row), self.seeds(model, "fp32")
        if scores is None or not seeds:
            return None
        whole = self.pooled_scores(model, "fp32", seeds)
        return _mean(scores - whole, seeds) if len(whole) == len(scores) else None

    def paired(self, row: str, other: str) -> Measurement | None:
        """Mean of the scores of `row` minus those of `other`, sentence by sentence."""
        one, two = self.scores(row), self.scores(other)
        return None if one is None or two is None else _mean(one - two, ())


def _mean(values: Floats, seeds: Sequence[int]) -> Measurement:
    """With the percentile-bootstrap interval over examples (Efron and Tibshirani 1993, ch. 13); the same draws for all."""
    draws = np.random.default_rng(0)
    means = [values[draws.integers(0, len(values), len(values))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    how = f"mean over examples{f' and {len(seeds)} seeds' if seeds else ''}; 95 % percentile interval of {RESAMPLES} samples"
    return Measurement(value=float(values.mean()), unit="", low=low, high=high, n=max(1, len(seeds)), method=how)
