"""Time of one call, all candidates in turn within each round, so that a slow minute of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flyweight.artifact import Measurement
from flyweight.context import NoProgress, Progress
from flyweight.engines.engine import Arrays, Predictor
from flyweight.measure.spread import quantile

__all__ = ["Point", "Samples", "Timing", "latency_figures", "latency_ratio", "random_arrays", "time_calls"]

WARM_UP = 3
SHORT_MS = 50.0
"""Below this a call is preceded by one that is not timed: the others in the round have emptied the caches, and in
service a model does not share them."""
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}

Samples = dict[str, NDArray[np.float64]]  # {candidate: milliseconds [rounds]}


class Point(NamedTuple):
    """A shape of input; printed as in the keys, `1x128`."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


@dataclass(frozen=True)
class Timing:
    """How long to go on. At least `least` rounds; then until `rounds`, or until a point has taken `limit_s` seconds."""

    rounds: int = 30
    limit_s: float = 90.0
    least: int = 6


def random_arrays(point: Point, vocabulary: int, seed: int) -> Arrays:
    """Token ids drawn evenly from [0, vocabulary), nothing masked: each [batch, length] int64."""
    shape = (point.batch, point.length)
    ids = np.random.default_rng([seed, *point]).integers(0, vocabulary, shape, dtype=np.int64)
    return {
        "input_ids": ids,
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
    }


def time_calls(
    predictors: Mapping[str, Predictor],
    points: Sequence[Point],
    vocabulary: int,
    timing: Timing = Timing(),
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[Point, Samples]:
    """Wall-clock milliseconds of `run` for each point, candidate and round; sample i of all candidates is one round."""
    progress = progress or NoProgress()
    found = {}
    for point in points:
        arrays = random_arrays(point, vocabulary, seed)
        for predictor in predictors.values():
            for _ in range(WARM_UP):
                predictor.run(arrays)
        taken: dict[str, list[float]] = {name: [] for name in predictors}
        names, start = list(predictors), time.perf_counter()
        for number in progress.track(range(timing.rounds), f"latency at {point}", total=timing.rounds):
            if number >= timing.least and time.perf_counter() - start > timing.limit_s:
                break
            turn = number % len(names)  # who goes first changes, so that nobody always follows the same neighbour
            for name in names[turn:] + names[:turn]:
                if not taken[name] or taken[name][-1] < SHORT_MS:
                    predictors[name].run(arrays)
                before = time.perf_counter_ns()
                predictors[name].run(arrays)
                taken[name].append((time.perf_counter_ns() - before) / 1e6)
        found[point] = {name: np.asarray(times) for name, times in taken.items()}
    return found


def latency_figures(taken: Mapping[Point, Samples], name: str, threads: int) -> dict[str, Measurement]:
    """`latency_ms.p50@1x128` and the like for one candidate, and `throughput_per_s@32x128` at the largest batch."""
    figures = {}
    largest = max((point.batch for point in taken), default=0)
    how = f"wall clock, {threads} thread{'s' if threads > 1 else ''}, random ids, interleaved rounds"
    for point, samples in taken.items():
        for label, share in QUANTILES.items():
            figures[f"latency_ms.{label}@{point}"] = quantile(samples[name], share, "ms", how)
        if point.batch == largest:
            figures[f"throughput_per_s@{point}"] = _throughput(figures[f"latency_ms.p50@{point}"], point.batch)
    return figures


def _throughput(median: Measurement, batch: int) -> Measurement:
    def per_second(ms: float | None) -> float | None:
        return None if ms is None else batch * 1000 / ms

    value = batch * 1000 / median.value
    return Measurement(
        value=value,
        unit="items/s",
        low=per_second(median.high),
        high=per_second(median.low),
        n=median.n,
        method=f"batch / median latency; {median.method}",
    )


def latency_ratio(of: NDArray[np.float64], to: NDArray[np.float64]) -> Measurement:
    """How many times faster `of` is than `to` ([rounds] each, of the same rounds): the median of the ratios to[i] / of[i]."""
    if len(of) != len(to):
        raise ValueError("samples of the same rounds are needed")
    return quantile(to / of, 0.5, "x", "median of the ratios within a round")
