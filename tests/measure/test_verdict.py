from __future__ import annotations

import pytest

from flyweight.artifact import Measurement
from flyweight.measure.verdict import accept
from flyweight.settings import Accept


def figure(value: float, low: float | None = None) -> Measurement:
    return Measurement(value=value, unit="share", low=low, high=None, method="test")


@pytest.mark.parametrize(
    ("rule", "low", "accepted"),
    [
        ({"max_drop": 0.02}, -0.019, True),
        ({"max_drop": 0.02}, -0.02, True),
        ({"max_drop": 0.02}, -0.021, False),
        ({"quality": 0.99}, -0.007, True),  # 1 % of .8 is .008
        ({"quality": 0.99}, -0.009, False),
        ({"quality": 0.5, "max_drop": 0.001}, -0.01, False),  # both must hold
        ({"quality": 1.0}, 0.001, True),
        ({"max_drop": 0.0}, -0.001, False),
    ],
)
def test_the_lower_bound_decides(rule: dict[str, float], low: float, accepted: bool) -> None:
    verdict = accept(Accept(**rule), figure(0.8), figure(0.001 + low, low), "accuracy")
    assert verdict.accepted is accepted
    assert verdict.text.startswith("Accepted" if accepted else "Not accepted")
    assert f"{100 * low:+.1f}" in verdict.text


def test_without_a_rule_nothing_is_refused_and_it_is_said() -> None:
    verdict = accept(Accept(), figure(0.8), figure(-0.3, -0.4))
    assert verdict.accepted
    assert "No acceptance rule" in verdict.text


def test_without_an_interval_the_value_itself_counts() -> None:
    assert not accept(Accept(max_drop=0.01), figure(0.8), figure(-0.02)).accepted


def test_cosines_are_told_as_they_are() -> None:
    reference = Measurement(value=1.0, unit="cosine", method="test")
    difference = Measurement(value=-0.00077, unit="cosine", low=-0.00082, method="test")
    verdict = accept(Accept(max_drop=0.001), reference, difference, "cosine")
    assert verdict.accepted
    assert "cosine 0.99923 against 1.00000" in verdict.text
    assert "lower bound of -0.00082; asked for at most 0.001 lost" in verdict.text
    assert "points" not in verdict.text
