"""What settings can do beyond holding values (their limits are tested with the steps that use them)."""

from __future__ import annotations

import pytest

from flyweight.settings import MeasureSettings


@pytest.mark.parametrize(("longest", "lengths"), [(512, (32, 128)), (64, (32, 64)), (16, (16,))])
def test_lengths_stay_within_the_model(longest: int, lengths: tuple[int, ...]) -> None:
    assert MeasureSettings(lengths=(32, 128)).within(longest).lengths == lengths
