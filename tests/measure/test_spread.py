"""Order-statistic intervals against the binomial distribution summed by hand, and their coverage."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from flyweight.measure.spread import order_ranks, quantile


def exact_tail(n: int, share: Fraction, ranks: range) -> Fraction:
    return sum((comb(n, k) * share**k * (1 - share) ** (n - k) for k in ranks), Fraction(0))


@pytest.mark.parametrize("n", [3, 6, 10, 30, 101])
@pytest.mark.parametrize("share", [Fraction(1, 2), Fraction(9, 10), Fraction(99, 100)])
def test_ranks_leave_at_most_a_fortieth_on_each_side_and_could_not_be_closer(n: int, share: Fraction) -> None:
    limit = Fraction(1, 40)
    low, high = order_ranks(n, float(share))
    if low is None:
        assert exact_tail(n, share, range(1)) > limit
    else:
        assert exact_tail(n, share, range(low + 1)) <= limit < exact_tail(n, share, range(low + 2))
    if high is None:
        assert exact_tail(n, share, range(n, n + 1)) > limit
    else:
        assert exact_tail(n, share, range(high + 1, n + 1)) <= limit < exact_tail(n, share, range(high, n + 1))


def test_known_ranks() -> None:
    assert order_ranks(6, 0.5) == (0, 5)  # 2 / 64 left out in all
    assert order_ranks(5, 0.5) == (None, None)
    assert order_ranks(30, 0.5) == (9, 20)  # the table's 10th and 21st
    assert order_ranks(367, 0.99)[1] is None
    assert order_ranks(368, 0.99)[1] == 367


def test_large_samples_do_not_overflow() -> None:
    low, high = order_ranks(20_000, 0.5)
    assert low is not None
    assert high is not None
    assert abs(low - (10_000 - 1.96 * 70.71)) < 3
    assert abs(high - (10_000 + 1.96 * 70.71)) < 3


def test_the_interval_covers_the_median_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(2000):
        figure = quantile(generator.exponential(size=30), 0.5, "ms", "test")
        assert figure.low is not None
        assert figure.high is not None
        hits += figure.low <= np.log(2) <= figure.high
    assert 0.94 <= hits / 2000 <= 0.985


def test_value_and_unit() -> None:
    figure = quantile([4.0, 1.0, 3.0, 2.0], 0.5, "ms", "by hand")
    assert (figure.value, figure.unit, figure.n) == (2.5, "ms", 4)
    assert figure.low is None
    assert figure.method.startswith("by hand")
