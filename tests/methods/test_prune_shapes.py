"""Shapes by dynamic programming, against trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

from engine_cases import LABELS, bundle_of
from flyweight.artifact import BlockShape
from flyweight.errors import StepError
from flyweight.measure.costs import Costs, Kind, byte_costs, flop_costs
from flyweight.measure.flops import flops
from flyweight.methods.prune.scores import Group
from flyweight.methods.prune.shapes import Options, best, choose, options_of
from flyweight.models import surgery

Tiny = Callable[..., Path]
Shapes = dict[str, tuple[BlockShape, ...]]


def tried(options: dict[str, Options], budget: float) -> tuple[float, float]:
    """(least loss, its cost) over all combinations within the budget."""
    found = (np.inf, np.inf)
    for numbers in itertools.product(*(range(len(one.kept)) for one in options.values())):
        cost = sum(one.cost[i] for one, i in zip(options.values(), numbers, strict=True))
        loss = sum(one.loss[i] for one, i in zip(options.values(), numbers, strict=True))
        if cost <= budget + 1e-9:
            found = min(found, (loss, cost))
    return found


def of(options: dict[str, Options], kept: dict[str, int]) -> tuple[float, float]:
    rows = [(one, int(np.flatnonzero(one.kept == kept[name])[0])) for name, one in options.items()]
    return sum(one.loss[i] for one, i in rows), sum(one.cost[i] for one, i in rows)


def random_options(seed: int, whole: bool) -> dict[str, Options]:
    """Neither loss nor cost is monotone: a number of units may be both worse and dearer than another."""
    chance = np.random.default_rng(seed)
    made = {}
    for name in "abcd":
        number = int(chance.integers(1, 6))
        cost = chance.integers(0, 12, number).astype(float) if whole else chance.uniform(0, 12, number)
        kept = np.sort(chance.permutation(20)[:number]) + 1
        made[name] = Options(kept, chance.uniform(0, 1, number), cost)
    return made


@pytest.mark.parametrize("seed", range(25))
def test_whole_costs_give_what_trying_everything_gives(seed: int) -> None:
    options = random_options(seed, whole=True)
    least = sum(one.cost.min() for one in options.values())
    for room in (0, 1, 5, 8, 20, 100):
        found = of(options, best(options, least + room, steps=max(room, 1)))  # a step is 1
        wanted = tried(options, least + room)
        assert found[0] == pytest.approx(wanted[0])
        assert found[1] <= least + room


@pytest.mark.parametrize("seed", range(25))
def test_other_costs_stay_within_the_budget_and_lose_little(seed: int) -> None:
    options = random_options(100 + seed, whole=False)
    least = sum(one.cost.min() for one in options.values())
    for room in (0.3, 4.7, 11.1):
        loss, cost = of(options, best(options, least + room))
        assert cost <= least + room
        assert loss >= tried(options, least + room)[0] - 1e-12
        assert loss <= tried(options, least + room * (1 - len(options) / 10_000))[0] + 1e-12  # what rounding up takes


def test_without_room_the_cheapest_are_kept() -> None:
    options = {
        "a": Options(np.array([1, 2, 3]), np.array([5.0, 3.0, 0.0]), np.array([2.0, 1.5, 4.0])),
        "b": Options(np.array([8, 16]), np.array([1.0, 0.5]), np.array([1.0, 1.0])),
    }
    assert best(options, 2.5) == {"a": 2, "b": 16}  # 2 units are cheaper than one here; equal cost: the lesser loss
    with pytest.raises(ValueError, match=r"at least 2\.5"):
        best(options, 2.4)


def test_of_equal_losses_the_cheaper_is_kept() -> None:
    options = {"a": Options(np.array([1, 2, 3]), np.zeros(3), np.array([1.0, 2.0, 3.0]))}
    assert best(options, 100.0) == {"a": 1}


def table(base: float = 10.0) -> tuple[Costs, Shapes, dict[Group, np.ndarray]]:
    """Two blocks of 3 heads (4 each) and 8 neurons (1 each, above the first); a block of the least costs 2."""
    curves = {
        Kind("encoder", 0): np.array([np.nan, 0.0, 4.0, 8.0]),
        Kind("encoder"): np.array([np.nan, *np.arange(8.0)]),
    }
    shapes = {"encoder": (BlockShape(heads=((0, 1, 2),), neurons=8), BlockShape(heads=((0, 2),), neurons=8))}
    chance = np.random.default_rng(0)
    losses = {
        group: np.append(np.inf, np.sort(chance.uniform(0, 1, units))[::-1])
        for group, units in (
            (Group("encoder", 0, 0), 3),
            (Group("encoder", 1, 0), 2),
            (Group("encoder", 0), 8),
            (Group("encoder", 1), 8),
        )
    }
    return Costs("ms", base, {"encoder": 2.0}, curves), shapes, losses


@pytest.mark.parametrize("speedup", [1.2, 1.5, 1.9, 2.4])
def test_a_choice_is_the_best_within_its_share_of_the_whole(speedup: float) -> None:
    costs, shapes, losses = table()
    found = choose(losses, costs, shapes, speedup)
    now = 10 + 2 * 2 + 8 + 4 + 2 * 7
    assert costs.total(shapes) == now == 40
    wanted = np.inf
    room = now / speedup - 14 - 4 * (now / speedup - 14) / 10_000  # rounding up takes at most a step from each group
    for numbers in itertools.product(range(1, 4), range(1, 3), range(1, 9), range(1, 9)):
        if 4 * (numbers[0] - 1) + 4 * (numbers[1] - 1) + numbers[2] - 1 + numbers[3] - 1 <= room:
            wanted = min(wanted, sum(loss[k] for loss, k in zip(losses.values(), numbers, strict=True)))
    assert found.loss == pytest.approx(wanted)
    assert found.cost <= now / speedup
    assert found.speedup == now / found.cost >= speedup
    blocks = tuple(
        BlockShape(heads=(tuple(range(found.kept[Group("encoder", i, 0)])),), neurons=found.kept[Group("encoder", i)])
        for i in range(2)
    )
    assert costs.total({"encoder": blocks}) == found.cost


@pytest.mark.parametrize("speedup", [1.3, 2.0, 3.0, 3.9])
def test_a_part_may_go_where_loss_and_cost_are_known(speedup: float) -> None:
    """Against all combinations. A block without heads saves 1.5 more than one with one, without neurons half."""
    costs, shapes, losses = table()
    curves = {kind: np.append(-1.5 if kind.attention == 0 else -0.5, curve[1:]) for kind, curve in costs.curves.items()}
    costs = Costs("ms", costs.base, costs.block, curves)
    chance = np.random.default_rng(1)
    gone = {group: np.append(loss[1] + chance.uniform(0, 0.3), loss[1:]) for group, loss in losses.items()}
    found = choose(gone, costs, shapes, speedup)
    curve = [curves[Kind("encoder", 0)]] * 2 + [curves[Kind("encoder")]] * 2
    tried = [
        (
            14 + sum(float(one[k]) for one, k in zip(curve, numbers, strict=True)),
            sum(loss[k] for loss, k in zip(gone.values(), numbers, strict=True)),
        )
        for numbers in itertools.product(range(4), range(3), range(9), range(9))
    ]
    rounded = 4 * (40 / speedup - 10) / 10_000  # what rounding up takes
    assert found.loss >= min(loss for cost, loss in tried if cost <= 40 / speedup + 1e-9) - 1e-9
    assert found.loss <= min(loss for cost, loss in tried if cost <= 40 / speedup - rounded) + 1e-9
    assert found.cost <= 40 / speedup
    with pytest.raises(StepError, match=r"at most 4, .*the least, 0 heads and 0 neurons \(10 of 40 ms\)"):
        choose(gone, costs, shapes, 4.1)
    assert 0 not in choose(losses, costs, shapes, min(speedup, 2.5)).kept.values()  # their losses are not known


def test_a_wish_beyond_the_floor_is_refused_with_what_is_possible() -> None:
    costs, shapes, losses = table()
    assert choose(losses, costs, shapes, 40 / 14).kept == dict.fromkeys(losses, 1)
    with pytest.raises(StepError, match=r"^expected a speedup of at most 2\.85, .*14 of 40 ms.*, got 3; ask for less"):
        choose(losses, costs, shapes, 3.0)


def test_what_may_not_be_cut_stays_and_counts() -> None:
    costs, shapes, losses = table()
    heads = {group: loss for group, loss in losses.items() if group.attention is not None}
    with pytest.raises(StepError, match=r"at most 1\.42, .*28 of 40 ms"):  # 14 + 7 + 7
        choose(heads, costs, shapes, 1.5)
    found = choose(heads, costs, shapes, 1.25)
    assert set(found.kept) == set(heads)
    assert found.cost <= 32


def test_neurons_in_multiples_or_all() -> None:
    costs, shapes, losses = table()
    options = options_of(losses, costs, shapes, 3)
    assert options[Group("encoder", 0)].kept.tolist() == [3, 6, 8]
    assert options[Group("encoder", 0)].cost.tolist() == [2.0, 5.0, 7.0]
    assert options[Group("encoder", 0)].loss.tolist() == losses[Group("encoder", 0)][[3, 6, 8]].tolist()
    assert options[Group("encoder", 0, 0)].kept.tolist() == [1, 2, 3]
    assert options_of(losses, costs, shapes, 16)[Group("encoder", 1)].kept.tolist() == [8]


def test_losses_must_be_numbers_and_as_many_as_units() -> None:
    costs, shapes, losses = table()
    broken = losses[Group("encoder", 1)].copy()
    broken[4] = np.nan
    with pytest.raises(StepError, match=r"losses of encoder\.1 that are numbers"):
        choose({**losses, Group("encoder", 1): broken}, costs, shapes, 2.0)
    with pytest.raises(ValueError, match="3 losses"):
        choose({Group("encoder", 1, 0): np.zeros(4)}, costs, shapes, 2.0)


@pytest.mark.parametrize("cost", ["flops", "bytes"])
@pytest.mark.parametrize("model_type", ["bert", "mpnet", "llama", "t5"])
def test_a_model_cut_to_the_choice_costs_what_was_promised(tiny: Tiny, model_type: str, cost: str) -> None:
    bundle = bundle_of(tiny(model_type, LABELS))
    costs = flop_costs(bundle, 24) if cost == "flops" else byte_costs(bundle)
    shapes = surgery.shapes(bundle.model, bundle.family)
    chance = np.random.default_rng(3)
    losses = {}
    for stack, blocks in shapes.items():
        for number, shape in enumerate(blocks):
            sizes = {Group(stack, number): shape.neurons}
            sizes |= {Group(stack, number, one): len(heads) for one, heads in enumerate(shape.heads)}
            losses |= {g: np.append(n, np.sort(chance.uniform(0, n, n))[::-1]) for g, n in sizes.items()}
    wish = 1.6 if cost == "flops" else 1.2
    before = flops(bundle, 24) if cost == "flops" else 4 * sum(p.numel() for p in bundle.model.parameters())
    found = choose(losses, costs, shapes, wish)
    for group, units in found.kept.items():
        if group.attention is None:
            surgery.keep_neurons(bundle.model, bundle.family, group.stack, group.block, range(units))
        else:
            surgery.keep_heads(bundle.model, bundle.family, group.stack, group.block, group.attention, range(units))
    after = flops(bundle, 24) if cost == "flops" else 4 * sum(p.numel() for p in bundle.model.parameters())
    assert before / after >= found.speedup * (1 - 1e-9) >= wish * (1 - 1e-9)
    assert before / after < 1.06 * wish  # nothing is given away beyond one head
