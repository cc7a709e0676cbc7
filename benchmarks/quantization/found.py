"""What the rows gave, by model and key."""

from __future__ import annotations

from benchmarks.found import Found as Rows
from benchmarks.found import mean_of
from benchmarks.models import Model
from benchmarks.quantization.classes import row_name
from benchmarks.tuned import SEEDS
from flyweight.artifact import Measurement


class Found(Rows):
    """All rows, and what is told of a key over its seeds."""

    def seeds(self, model: Model, key: str) -> list[int]:
        """Those for which the row and its reference were run."""
        needed = [(row_name(model, key, seed), row_name(model, "fp32", seed)) for seed in SEEDS]
        return [seed for seed, pair in zip(SEEDS, needed, strict=True) if all(name in self.rows for name in pair)]

    def accuracy(self, model: Model, key: str) -> Measurement | None:
        return self.mean(self._names(model, key))

    def drop(self, model: Model, key: str) -> Measurement | None:
        """Accuracy minus that of the fp32 model of the same seed, each example's difference averaged over the seeds."""
        seeds = self.seeds(model, key)
        return self.minus(self._names(model, key), [row_name(model, "fp32", seed) for seed in seeds])

    def beside(self, row: str, model: Model) -> Measurement | None:
        """A row without seeds minus the fp32 model, averaged over its seeds; None where they saw other examples (a trial)."""
        scores, names = self.scores(row), self._names(model, "fp32")
        if scores is None or not names:
            return None
        whole = self.mean_scores(names)
        return mean_of(scores - whole, len(names)) if len(whole) == len(scores) else None

    def _names(self, model: Model, key: str) -> list[str]:
        return [row_name(model, key, seed) for seed in self.seeds(model, key)]
