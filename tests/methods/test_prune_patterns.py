"""N:M masks and row-wise shares against loops over single weights, and which layers a pattern fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyweight.errors import StepError
from flyweight.methods.prune.masks import (
    check,
    counts,
    fitting,
    is_n_of_m,
    masks,
    n_and_m,
    n_of_m,
    row_wise,
    smallest,
    stored_as,
    two_of_four,
)
from flyweight.settings import PruneSettings

PATTERNS = [(1, 2), (2, 4), (1, 4), (4, 8), (3, 5), (10, 16)]


def slow_n_of_m(scores: list[list[float]], n: int, m: int) -> list[list[bool]]:
    """Weight by weight: it stays if fewer than n of its group are larger, or equal and before it."""
    found = []
    for row in scores:
        kept = []
        for j, own in enumerate(row):
            group = range(j - j % m, j - j % m + m)
            kept.append(sum(row[k] > own or (row[k] == own and k < j) for k in group) < n)
        found.append(kept)
    return found


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_n_of_every_m_stay(n: int, m: int) -> None:
    scores = torch.randint(0, 6, (5, 3 * m), generator=torch.Generator().manual_seed(n * m)).float()  # with ties
    kept = n_of_m(scores, n, m)
    assert kept.tolist() == slow_n_of_m(scores.tolist(), n, m)
    assert is_n_of_m(torch.ones_like(scores) * kept, n, m)
    assert not is_n_of_m(torch.ones_like(scores), n, m)
    assert not is_n_of_m(torch.zeros(2, 3 * m + 1), n, m)
    assert torch.equal(n_of_m(scores[:, :4], 2, 4), two_of_four(scores[:, :4]))


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_magnitude_and_random_take_any_pattern(n: int, m: int) -> None:
    weight = torch.randn(4, 4 * m, generator=torch.Generator().manual_seed(m))
    for criterion in ("magnitude", "random"):
        settings = PruneSettings(pattern=f"{n}:{m}", criterion=criterion)
        kept = masks({"w": weight}, settings, None, seed=0)["w"]
        assert (kept.reshape(4, 4, m).sum(-1) == n).all()
        whole = masks({"w": weight}, settings, 1 - n / m, seed=0)["w"]
        assert torch.equal(whole, kept)
        half = masks({"w": weight}, settings, (1 - n / m) / 2, seed=0)["w"]  # on the way
        assert int((~half).sum()) == counts(weight.numel(), (1 - n / m) / 2)
        assert (half | ~kept).all()
    largest = masks({"w": weight}, PruneSettings(pattern=f"{n}:{m}"), None, seed=0)["w"]
    assert largest.tolist() == slow_n_of_m(weight.abs().tolist(), n, m)


def test_patterns_are_read_and_stored() -> None:
    assert [n_and_m(pattern) for pattern in ("2:4", "10:16", "unstructured")] == [(2, 4), (10, 16), None]
    assert [stored_as(pattern) for pattern in ("2:4", "4:8", "1:2", "unstructured")] == ["2:4", *3 * ["unstructured"]]


def test_layers_that_a_pattern_does_not_fit_are_left_out() -> None:
    widths = {"a": 32, "b": 30, "c": 8, "d": 12}
    assert fitting(widths, "2:4") == (["a", "c", "d"], ["b"])
    assert fitting(widths, "4:8") == (["a", "c"], ["b", "d"])
    assert fitting(widths, "unstructured") == (["a", "b", "c", "d"], [])
    with pytest.raises(
        StepError, match="weights with a multiple of 7 inputs for the pattern 3:7, got none, 32 in a; set"
    ):
        fitting(widths, "3:7")
    assert fitting({}, "2:4") == ([], [])


@given(st.integers(1, 7), st.integers(1, 13), st.floats(0, 1))
def test_rows_lose_alike_and_all_together_the_share(rows: int, width: int, share: float) -> None:
    scores = (torch.arange(rows * width) * 7 % 5).float().reshape(rows, width)
    kept = row_wise(scores, share)
    gone = (~kept).sum(1)
    assert int(gone.sum()) == counts(rows * width, share)
    assert gone.max() - gone.min() <= 1
    for row, stays in zip(scores, kept, strict=True):
        if stays.any() and not stays.all():
            assert row[~stays].max() <= row[stays].min()


def test_smallest_takes_exactly_so_many() -> None:
    scores = torch.tensor([[3.0, 1.0, 1.0], [1.0, 0.0, 2.0]])
    assert smallest(scores, 0).sum() == 0
    assert smallest(scores, 3).tolist() == [[False, True, True], [False, True, False]]
    assert smallest(scores, 6).all()


def test_what_a_solver_cannot_do_is_named() -> None:
    good = torch.ones(4, 6)
    for share, word in ((0.01, "raise it"), (0.99, "lower it"), (None, "raise it")):
        with pytest.raises(
            StepError, match=rf"some of the 24 weights of b\.weight and leaves some, got {share}; {word}"
        ):
            check({"b.weight": good, "c": good}, share, "unstructured")
    with pytest.raises(StepError, match=r"inputs of b\.weight in multiples of 4 for 2:4, got 6; leave it out"):
        check({"a": torch.ones(4, 8), "b.weight": good}, None, "2:4")
    with pytest.raises(StepError, match=r"finite weights in b\.weight, got NaN or inf"):
        check({"b.weight": good.index_fill(0, torch.tensor([1]), torch.nan)}, 0.5, "unstructured")
    check({"a": good}, 0.5, "unstructured")
    check({"a": good}, None, "2:3")
