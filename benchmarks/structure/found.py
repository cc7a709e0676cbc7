"""What is told of an ask over its seeds."""

from __future__ import annotations

from benchmarks.found import Found as Rows
from benchmarks.found import mean_of
from benchmarks.models import Model
from benchmarks.structure.asks import Ask, reference_seed, row_name
from flyweight.artifact import Measurement


class Found(Rows):
    """All rows, and differences between asks, seed by seed."""

    def seeds(self, ask: Ask) -> list[int]:
        """Those for which it and its reference were run."""
        return [seed for seed in ask.seeds if self._has(ask.row(seed), self.reference(ask.model, seed))]

    def reference(self, model: Model, seed: int) -> str:
        return row_name(model, "fp32", reference_seed(model, seed))

    def accuracy(self, ask: Ask) -> Measurement | None:
        return self.mean([ask.row(seed) for seed in self.seeds(ask)])

    def drop(self, ask: Ask) -> Measurement | None:
        """Accuracy minus that of the reference it began with."""
        seeds = self.seeds(ask)
        return self.minus([ask.row(seed) for seed in seeds], [self.reference(ask.model, seed) for seed in seeds])

    def over(self, ask: Ask, control: str = "") -> Measurement | None:
        """Accuracy minus that of its control (`MODEL-KEY`) under the same seed."""
        name = control or ask.control
        seeds = [seed for seed in ask.seeds if self._has(ask.row(seed), f"{name}-s{seed}")]
        return self.minus([ask.row(seed) for seed in seeds], [f"{name}-s{seed}" for seed in seeds])

    def first(self, ask: Ask, key: str) -> Measurement | None:
        """A figure under the first seed that has it."""
        figures = (self.figure(ask.row(seed), key) for seed in ask.seeds)
        return next((figure for figure in figures if figure is not None), None)

    def beside(self, row: str, model: Model, seeds: tuple[int, ...]) -> Measurement | None:
        """A row without seeds minus the references, averaged over them; None where they saw other examples (a trial)."""
        names = [name for seed in seeds if (name := self.reference(model, seed)) in self.rows]
        scores = self.scores(row)
        if scores is None or not names:
            return None
        whole = self.mean_scores(names)
        return mean_of(scores - whole, len(names)) if len(whole) == len(scores) else None

    def _has(self, *rows: str) -> bool:
        return all(self.scores(row) is not None for row in rows)
