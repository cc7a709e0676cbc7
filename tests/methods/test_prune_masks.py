"""Masks, selection and schedule against numbers computed by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyweight.errors import StepError
from flyweight.methods.prune.masks import RAMP, cubic_share, is_two_of_four, masks, two_of_four
from flyweight.methods.prune.scores import Group
from flyweight.methods.prune.structured import check, select
from flyweight.settings import PruneSettings

A = torch.tensor([[0.1, -0.9, 0.3, -0.4], [0.5, 0.05, -0.6, 0.2]])
B = torch.tensor([[10.0, -0.25, 0.0, 7.0]])


def settings(**values):
    return PruneSettings(**values)


def test_amount_within_each_layer():
    kept = masks({"a": A, "b": B}, settings(amount=0.5), 0.5, seed=0)
    assert kept["a"].tolist() == [[False, True, False, True], [True, False, True, False]]
    assert kept["b"].tolist() == [[True, False, False, True]]


def test_amount_over_all_layers():
    """The six smallest of twelve: 0, .05, .1, .2, .25, .3."""
    kept = masks({"a": A, "b": B}, settings(amount=0.5, scope="global"), 0.5, seed=0)
    assert kept["a"].tolist() == [[False, True, False, True], [True, False, True, False]]
    assert kept["b"].tolist() == [[True, False, False, True]]
    kept = masks({"a": A, "b": B}, settings(amount=0.75, scope="global"), 0.75, seed=0)
    assert kept["a"].tolist() == [[False, True, False, False], [False] * 4]  # of nine that go, all but .9 are here
    assert kept["b"].tolist() == [[True, False, False, True]]


def test_threshold():
    kept = masks({"a": A, "b": B}, settings(threshold=0.3), None, seed=0)
    assert kept["a"].tolist() == [[False, True, True, True], [True, False, True, False]]
    assert kept["b"].tolist() == [[True, False, False, True]]


def test_two_of_every_four():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.0, 5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, -1.0, -4.0, 3.0, -2.0, 1.0]])
    kept = masks({"w": weight}, settings(pattern="2:4"), None, seed=0)["w"]
    assert kept.tolist() == [
        [False, True, True, False, True, True, False, False],
        [True, False, False, True, True, True, False, False],
    ]
    assert is_two_of_four(weight * kept)
    assert not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(2, 6))


def test_two_of_four_on_the_way_takes_the_smallest_of_those_that_will_go():
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5, 9.0, 8.0, 7.0, 6.0]])
    kept = masks({"w": weight}, settings(pattern="2:4"), 0.25, seed=0)["w"]
    assert kept.tolist() == [[False, True, True, False, True, True, True, True]]
    kept = masks({"w": weight}, settings(pattern="2:4"), 0.375, seed=0)["w"]
    assert kept.tolist() == [[False, True, True, False, True, True, True, False]]


@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 5))
def test_exactly_the_rounded_share_goes_even_among_equals(size, share, distinct):
    weight = (torch.arange(size) % (distinct + 1)).float()[None]
    gone = ~masks({"w": weight}, settings(amount=0.5), share, seed=0)["w"]
    assert int(gone.sum()) == int(share * size + 0.5)
    if gone.any() and not gone.all():
        assert weight[gone].max() <= weight[~gone].min()


def test_random_is_seeded_and_takes_zeros_first():
    weight = torch.ones(20, 20)
    weight[0] = 0
    one, same, other = (
        masks({"w": weight}, settings(amount=0.5, criterion="random"), 0.5, seed=seed)["w"] for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not one[0].any()
    assert int(one.sum()) == 200


def test_cubic_schedule_follows_the_formula():
    """Zhu and Gupta 2017, eq. 1 with s_i = 0, t0 = 0 and the end of the ramp at RAMP of the steps."""
    assert RAMP == 0.75
    assert cubic_share(0, 100, 0.8) == 0
    assert cubic_share(15, 100, 0.8) == pytest.approx(0.8 * (1 - 0.8**3))  # t = .2
    assert cubic_share(30, 100, 0.8) == pytest.approx(0.8 * (1 - 0.6**3))  # t = .4
    assert cubic_share(75, 100, 0.8) == pytest.approx(0.8)
    assert cubic_share(100, 100, 0.8) == pytest.approx(0.8)
    shares = [cubic_share(step, 40, 0.5) for step in range(41)]
    assert shares == sorted(shares)


def scores(**rows):
    return {Group(name): torch.tensor(row) for name, row in rows.items()}


def kept(found):
    return {group.stack: stay for group, stay in found.items()}


def test_select_within_each_group():
    found = select(scores(a=[4.0, 1.0, 3.0, 2.0], b=[0.1, 0.4, 0.2, 0.3]), 0.5, "layer")
    assert kept(found) == {"a": [0, 2], "b": [1, 3]}


def test_select_over_all_groups_keeps_one_of_each():
    found = select(scores(a=[4.0, 1.0, 3.0, 2.0], b=[0.1, 0.4, 0.2, 0.3]), 0.5, "global")
    assert kept(found) == {"a": [0, 2, 3], "b": [1]}  # .1, .2, .3 and then 1: .4 is the last of b
    found = select(scores(a=[4.0, 1.0, 3.0, 2.0], b=[0.1, 0.4, 0.2, 0.3]), 0.75, "global")
    assert kept(found) == {"a": [0], "b": [1]}


def test_select_rounds_up_to_a_multiple():
    row = [float(i) for i in range(10)]
    assert kept(select(scores(a=row), 0.5, "layer", multiple_of=4)) == {"a": list(range(2, 10))}
    assert kept(select(scores(a=row), 0.2, "layer", multiple_of=8)) == {"a": list(range(2, 10))}
    assert kept(select(scores(a=row), 0.1, "layer", multiple_of=8)) == {"a": list(range(10))}  # 16 are not there
    assert kept(select(scores(a=row, b=[9.5] * 8), 0.3, "global", multiple_of=4)) == {
        "a": list(range(2, 10)),
        "b": list(range(8)),
    }


@given(st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=9), min_size=1, max_size=5), st.floats(0, 0.99))
def test_a_larger_share_keeps_a_subset(rows, share):
    """The gradual schedule relies on it."""
    found = {Group(str(i)): torch.tensor(row) for i, row in enumerate(rows)}
    for scope in ("layer", "global"):
        for multiple in (1, 3):
            more = select(found, share / 2, scope, multiple)
            less = select(found, share, scope, multiple)
            assert all(set(less[group]) <= set(more[group]) for group in found)
            assert all(less.values())


SIZES = {Group("encoder", i, 0): 12 for i in range(6)}


@pytest.mark.parametrize(
    ("sizes", "values", "message"),
    [
        (
            SIZES,
            {"target": "heads", "amount": 0.04},
            r"at least one head of 12 in a block, got 0.04; raise it to 0.042",
        ),
        (
            SIZES,
            {"target": "heads", "amount": 0.96},
            r"leaves at least one head of 12 in a block, got 0.96; lower it to 0.95",
        ),
        (
            SIZES,
            {"target": "heads", "amount": 0.95, "scope": "global"},
            r"one head of 72 over all blocks, got 0.95; lower",
        ),
        (SIZES, {"target": "heads", "amount": 0.006, "scope": "global"}, r"one head of 72 over all blocks, got 0.006"),
        ({Group("encoder"): 6}, {"target": "layers", "amount": 0.95}, r"leaves at least one layer of 6 in a stack"),
        ({Group("encoder"): 1}, {"target": "layers", "amount": 0.5}, r"more than one layer in a stack"),
        (
            {Group("encoder", 0): 64},
            {"target": "neurons", "amount": 0.2, "multiple_of": 64},
            r"removes neurons of 64 in a block in multiples of 64, got 0.2; raise amount or lower multiple_of",
        ),
    ],
)
def test_amounts_that_come_to_nothing_or_everything_are_refused(sizes, values, message):
    with pytest.raises(StepError, match=message):
        check(sizes, settings(**values))


@pytest.mark.parametrize("amount", [0.042, 0.5, 0.957])
def test_amounts_that_the_messages_name_are_accepted(amount):
    check(SIZES, settings(target="heads", amount=amount))


def test_order_of_equals_is_stable():
    assert two_of_four(torch.ones(1, 8)).tolist() == [[True, True, False, False] * 2]
