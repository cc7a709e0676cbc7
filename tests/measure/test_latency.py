"""Order of the calls, the figures made of them, and the paired ratio."""

from __future__ import annotations

import numpy as np
import pytest

from flyweight.engines.engine import Arrays
from flyweight.measure import latency
from flyweight.measure.latency import Point, Timing, latency_figures, latency_ratio, random_arrays, time_calls


class Slow:
    """Takes exactly `ms` on a clock that only it moves."""

    def __init__(self, name: str, ms: float, clock: list[int], log: list[str]) -> None:
        self.name, self.ms, self.clock, self.log = name, ms, clock, log

    def run(self, arrays: Arrays) -> np.ndarray:
        batch, length = arrays["input_ids"].shape
        self.clock[0] += int(self.ms * batch * length * 1e6)
        self.log.append(self.name)
        return np.zeros((batch, 2), np.float32)

    def close(self) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    now = [0]
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0] / 1e9)
    return now


def test_times_are_those_of_the_calls(clock: list[int]) -> None:
    log: list[str] = []
    predictors = {"a": Slow("a", 0.5, clock, log), "b": Slow("b", 2.0, clock, log)}
    points = [Point(1, 8), Point(4, 8)]
    taken = time_calls(predictors, points, vocabulary=50, timing=Timing(rounds=10))
    assert {str(point): {name: set(times) for name, times in s.items()} for point, s in taken.items()} == {
        "1x8": {"a": {4.0}, "b": {16.0}},
        "4x8": {"a": {16.0}, "b": {64.0}},
    }
    figures = latency_figures(taken, "b", threads=1)
    assert figures["latency_ms.p50@1x8"].value == 16.0
    assert figures["throughput_per_s@4x8"].value == pytest.approx(4 / 0.064)
    assert "throughput_per_s@1x8" not in figures
    assert latency_ratio(taken[points[0]]["a"], taken[points[0]]["b"]).value == 4.0


def test_calls_are_interleaved_and_take_turns_in_going_first(clock: list[int]) -> None:
    log: list[str] = []
    predictors = {name: Slow(name, 100.0, clock, log) for name in "abc"}  # long calls: none is made untimed
    time_calls(predictors, [Point(1, 1)], vocabulary=50, timing=Timing(rounds=4, limit_s=1e9))
    warm, rest = log[:9], log[9:]
    assert warm == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    # the first turn of each is preceded by an untimed call, because nothing is known of its length yet
    assert rest == list("aabbcc") + list("bca") + list("cab") + list("abc")


def test_a_long_point_ends_at_the_limit_but_not_before_enough_rounds(clock: list[int]) -> None:
    predictors = {"a": Slow("a", 1000.0, clock, [])}
    taken = time_calls(predictors, [Point(1, 1)], 50, Timing(rounds=100, limit_s=3.0, least=6))
    assert len(taken[Point(1, 1)]["a"]) == 6
    taken = time_calls(predictors, [Point(1, 1)], 50, Timing(rounds=100, limit_s=20.0, least=6))
    assert 6 < len(taken[Point(1, 1)]["a"]) < 25


def test_throughput_turns_the_interval_round() -> None:
    times = {Point(2, 4): {"a": np.arange(1.0, 32.0)}}
    figures = latency_figures(times, "a", threads=2)
    median, rate = figures["latency_ms.p50@2x4"], figures["throughput_per_s@2x4"]
    assert median.low is not None
    assert rate.high == pytest.approx(2000 / median.low)
    assert rate.low is not None
    assert rate.high is not None
    assert rate.low < rate.value < rate.high
    assert "2 threads" in median.method


def test_the_ratio_is_paired_so_a_slow_machine_cancels() -> None:
    generator = np.random.default_rng(0)
    slow = generator.uniform(1, 10, 40)
    ratio = latency_ratio(2.0 * slow, 6.0 * slow)
    assert ratio.value == pytest.approx(3.0)
    assert ratio.low == pytest.approx(3.0)
    with pytest.raises(ValueError, match="same rounds"):
        latency_ratio(np.ones(3), np.ones(4))


def test_ids_lie_within_the_vocabulary_and_follow_the_seed() -> None:
    arrays = random_arrays(Point(16, 64), 37, seed=5)
    ids = arrays["input_ids"]
    assert ids.shape == (16, 64)
    assert ids.dtype == np.int64
    assert set(ids.ravel()) == set(range(37))
    assert arrays["attention_mask"].all()
    assert not arrays["token_type_ids"].any()
    np.testing.assert_array_equal(ids, random_arrays(Point(16, 64), 37, seed=5)["input_ids"])
    assert (ids != random_arrays(Point(16, 64), 37, seed=6)["input_ids"]).any()
