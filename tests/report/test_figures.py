from __future__ import annotations

import pytest

from flyweight.artifact import Measurement
from flyweight.report.figures import change, interval, label, number, ordered, show


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (23_100_000, "B", "23.1 MB"),
        (999, "B", "999 B"),
        (1_234_567_890, "B", "1.23 GB"),
        (0, "B", "0 B"),
        (22_713_986, "weights", "22.7 M"),
        (384, "weights", "384"),
        (2_867_000_000, "FLOP", "2.87 GFLOP"),
        (0.8388, "share", "83.9 %"),
        (4.2, "ms", "4.20 ms"),
        (1163.0, "ms", "1.16 s"),
        (0.0779, "J", "77.9 mJ"),
        (1.04e-5, "g", "10.4 µg"),
        (5.1, "x", "5.10x"),
        (1234.5, "items/s", "1,234 items/s"),
        (0.182, "price", "0.182"),
    ],
)
def test_numbers_as_people_write_them(value: float, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_differences_are_told_in_points() -> None:
    figure = Measurement(value=-0.005, unit="share", low=-0.0165, high=0.0065, method="")
    assert show("quality.accuracy.difference", figure) == "-0.5 points"
    assert interval("quality.accuracy.difference", figure) == "-1.7 to +0.7"


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [(4.1, 4.32, "4.10 to 4.32"), (4.1, None, "from 4.10"), (None, 4.3, "up to 4.30"), (None, None, "")],
)
def test_intervals_may_have_one_side_or_none(low: float | None, high: float | None, text: str) -> None:
    assert interval("latency_ms.p50@1x128", Measurement(value=4.2, unit="ms", low=low, high=high, method="")) == text


def test_an_interval_has_the_scale_of_its_value() -> None:
    figure = Measurement(value=1_001_000, unit="B", low=990_000, high=1_100_000, method="")
    assert interval("peak_memory_bytes", figure) == "0.990 to 1.10"


def one(value: float, unit: str = "ms") -> Measurement:
    return Measurement(value=value, unit=unit, method="")


def test_changes() -> None:
    assert change("bytes", one(20, "B"), one(100, "B")) == "5.00x less"
    assert change("throughput_per_s@32x128", one(60), one(20)) == "3.00x more"
    assert change("bytes", one(1001), one(1000)) == "same"
    assert change("bytes", one(0), one(1000)) == ""
    assert change("quality.accuracy", one(0.834, "share"), one(0.839, "share")) == "-0.5 points"


def test_labels_and_order() -> None:
    keys = [
        "cost_per_million",
        "latency_ms.p50@32x32",
        "latency_ms.p50@1x128",
        "latency_ms.p50@1x32",
        "own_key",
        "bytes",
    ]
    keys += ["quality.accuracy", "bytes.mlp"]
    assert ordered(keys) == [
        "quality.accuracy", "bytes", "bytes.mlp", "latency_ms.p50@1x32", "latency_ms.p50@1x128", "latency_ms.p50@32x32",
        "cost_per_million", "own_key",
    ]  # fmt: skip
    assert label("latency_ms.p50@1x128") == "latency p50 1x128"
    assert label("speedup.reference_torch@1x32") == "times faster than torch fp32 1x32"
    assert label("quality.macro_f1") == "macro f1"
    assert label("own_key") == "own key"


def test_cosines_show_what_percents_would_hide() -> None:
    cosine = Measurement(value=0.999231, unit="cosine", low=0.99921, high=0.99925, method="test")
    assert show("quality.cosine", cosine) == "0.99923"
    assert interval("quality.cosine", cosine) == "0.99921 to 0.99925"
    moved = Measurement(value=-0.000769, unit="cosine", method="test")
    assert show("quality.cosine.difference", moved) == "-0.00077"
    whole = Measurement(value=1.0, unit="cosine", method="test")
    assert change("quality.cosine", cosine, whole) == "-0.00077"
