"""Small models: which there are, and that each has the shapes that it is to tell of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

import torch

from engine_cases import LABELS, bundle_of
from flyweight.measure.costs import Kind, kept, most_units
from flyweight.measure.latency import Point, random_arrays
from flyweight.measure.probes import Probe, grid, plan, regular, small_model
from flyweight.measure.race import Terms, ready
from flyweight.models import shared_bias, surgery

Tiny = Callable[..., Path]
HEADS, NEURONS = Kind("encoder", 0), Kind("encoder")
MPNET = {HEADS: 12, NEURONS: 3072}


def test_grids_are_fine_where_it_matters_and_end_at_all() -> None:
    assert grid(12, neurons=False) == list(range(1, 13))
    assert grid(1, neurons=False) == [1]
    many = grid(40, neurons=False)
    assert (len(many), many[0], many[-1]) == (16, 1, 40)
    assert grid(3072, neurons=True) == [16, 192, 384, 576, 768, 1152, 1536, 1920, 2304, 2688, 3072]
    assert grid(10, neurons=True) == list(range(1, 11))
    assert grid(100, neurons=True) == [16, 32, 48, 64, 80, 96, 100]
    for most in (17, 64, 100, 1000, 1536):
        values = grid(most, neurons=True)
        assert values == sorted(set(values))
        assert values[-1] == most
        assert all(regular(units, most) for units in values)
    assert not regular(769, 3072)
    assert regular(9, 10)


def test_a_plan_changes_one_kind_at_a_time() -> None:
    probes = plan(MPNET, 2)
    anchor = probes["anchor"]
    assert next(iter(probes)) == "anchor"
    assert anchor == Probe({HEADS: 3, NEURONS: 768}, {"encoder": 2})
    single: dict[Kind, list[int]] = {HEADS: [], NEURONS: []}
    for name, probe in probes.items():
        other = [kind for kind in MPNET if probe.kept[kind] != anchor.kept[kind]]
        if len(other) == 1 and name not in ("all of all", "half of all", "few heads"):
            single[other[0]].append(probe.kept[other[0]])
    assert sorted([*single[HEADS], 3]) == list(range(1, 13))
    assert sorted(single[NEURONS]) == sorted({*grid(3072, True), 769, 776, 1537, 1544} - {768})
    assert probes["encoder: 6 blocks"] == Probe(anchor.kept, {"encoder": 6})
    assert probes["all of all"].kept == MPNET
    assert probes["half of all"].kept == {HEADS: 6, NEURONS: 1536}
    assert probes["few heads"].kept == {HEADS: 1, NEURONS: 3072}
    assert len(probes) == 12 + 11 - 1 + 4 + 1 + 3  # the anchor is in both grids


def test_two_stacks_are_told_apart() -> None:
    most = {
        Kind("encoder", 0): 4,
        Kind("encoder"): 64,
        Kind("decoder", 0): 4,
        Kind("decoder", 1): 2,
        Kind("decoder"): 32,
    }
    probes = plan(most, 1)
    assert probes["encoder: 3 blocks"].deep == {"encoder": 3, "decoder": 1}
    assert probes["decoder: 3 blocks"].deep == {"encoder": 1, "decoder": 3}
    assert probes["decoder heads of attention 1: 2"].kept == {**probes["anchor"].kept, Kind("decoder", 1): 2}


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "mpnet", "llama", "gpt2", "t5"])
def test_a_small_model_has_its_shapes(tiny: Tiny, family: str) -> None:
    bundle = bundle_of(tiny(family, LABELS))
    most = most_units(surgery.shapes(bundle.model, bundle.family))
    deep = {kind.stack: 2 for kind in most}
    keep = {kind: max(1, units // 2) for kind, units in most.items()}
    made = small_model(bundle, Probe(keep, deep), 20)
    shapes = surgery.shapes(made.model, made.family)
    assert {name: len(blocks) for name, blocks in shapes.items()} == deep
    assert {(kind, kept(shape, kind)) for kind in most for shape in shapes[kind.stack]} == set(keep.items())
    assert not made.model.training
    assert made.family is bundle.family
    before = surgery.shapes(bundle.model, bundle.family)
    assert {kind: kept(before[kind.stack][-1], kind) for kind in most} == most  # the model at hand is left as it was


@pytest.mark.parametrize("family", ["bert", "mpnet", "gpt2"])
def test_a_small_model_runs_at_its_length_and_is_small(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = bundle_of(tiny(family, LABELS))
    words = bundle.model.config.vocab_size
    probe = Probe(
        dict.fromkeys(most_units(surgery.shapes(bundle.model, bundle.family)), 1), {"encoder": 1, "decoder": 1}
    )
    made = small_model(bundle, probe, 40)
    assert made.model.config.vocab_size <= 64 < words == bundle.model.config.vocab_size
    model = ready(made, Terms(point=Point(2, 40)), tmp_path)
    found = model.run(random_arrays(Point(2, 40), made.model.config.vocab_size, 0))
    assert found.shape == (2, 2)
    assert torch.isfinite(torch.from_numpy(found)).all()


def test_blocks_that_share_a_bias_take_their_own_columns(tiny: Tiny) -> None:
    bundle = bundle_of(tiny("mpnet", LABELS))
    made = small_model(bundle, Probe({HEADS: 3, NEURONS: 64}, {"encoder": 2}), 20)
    row, blocks = made.family.stacks[0], surgery.blocks(made.model, made.family)["encoder"]
    assert [surgery.kept_heads(block, row.attention[0]) for block in blocks] == [(0, 1, 2), (1, 2, 3)]
    assert all(shared_bias.is_sliced(block.get_submodule(row.attention[0].module)) for block in blocks)


def test_weights_are_always_the_same_and_cost_no_random_numbers(tiny: Tiny) -> None:
    bundle = bundle_of(tiny("bert", LABELS))
    probe = Probe({HEADS: 2, NEURONS: 32}, {"encoder": 1})
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    one, other = small_model(bundle, probe, 20), small_model(bundle, probe, 20)
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_model_that_was_cut_before_is_measured_as_it_is(tiny: Tiny) -> None:
    """The config still says 4 heads; blocks have 3 and 2."""
    bundle = bundle_of(tiny("bert", LABELS))
    for block in range(4):
        surgery.keep_heads(bundle.model, bundle.family, "encoder", block, 0, [0, 1, 3] if block else [1, 2])
        surgery.keep_neurons(bundle.model, bundle.family, "encoder", block, range(48))
    most = most_units(surgery.shapes(bundle.model, bundle.family))
    assert most == {HEADS: 3, NEURONS: 48}
    made = small_model(bundle, plan(most, 2)["all of all"], 20)
    shapes = surgery.shapes(made.model, made.family)["encoder"]
    assert [(len(shape.heads[0]), shape.neurons) for shape in shapes] == [(3, 48)] * 2
