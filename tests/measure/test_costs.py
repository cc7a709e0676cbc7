"""Counted costs against a model that was really cut: every family, several blocks, every kind of unit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

from engine_cases import LABELS, bundle_of
from flyweight.artifact import BlockShape
from flyweight.measure.costs import Costs, Kind, byte_costs, flop_costs, kept, most_units
from flyweight.measure.flops import flops
from flyweight.models import surgery
from flyweight.models.bundle import Bundle

Tiny = Callable[..., Path]
CLASSIFIERS = ("bert", "distilbert", "roberta", "electra", "mpnet", "llama", "gpt2", "t5")


def cut(bundle: Bundle) -> None:
    """Every block otherwise than the one before it."""
    for stack, shapes in surgery.shapes(bundle.model, bundle.family).items():
        for block, shape in enumerate(shapes):
            surgery.keep_neurons(bundle.model, bundle.family, stack, block, range(0, shape.neurons, 2 + block))
            for attention, heads in enumerate(shape.heads):
                left = range(max(1, len(heads) - block - attention))
                surgery.keep_heads(bundle.model, bundle.family, stack, block, attention, left)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_flops_are_those_of_the_cut_model(tiny: Tiny, model_type: str) -> None:
    bundle = bundle_of(tiny(model_type, LABELS))
    costs = flop_costs(bundle, 24)
    assert costs.total(surgery.shapes(bundle.model, bundle.family)) == flops(bundle, 24)
    cut(bundle)
    assert costs.total(surgery.shapes(bundle.model, bundle.family)) == flops(bundle, 24)
    again = flop_costs(bundle, 24)  # made from the cut model it says the same
    assert again.total(surgery.shapes(bundle.model, bundle.family)) == flops(bundle, 24)
    assert again.base == costs.base
    assert again.block == costs.block


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_bytes_are_those_of_the_cut_model(tiny: Tiny, model_type: str) -> None:
    bundle = bundle_of(tiny(model_type, LABELS))
    costs = byte_costs(bundle)
    table = sum(p.numel() for name, p in bundle.model.named_parameters() if "relative_attention_bias" in name)
    cut(bundle)
    left = sum(p.numel() for p in bundle.model.parameters())
    shrunk = table - sum(p.numel() for n, p in bundle.model.named_parameters() if "relative_attention_bias" in n)
    assert costs.total(surgery.shapes(bundle.model, bundle.family)) == 4 * (left + shrunk)


def test_layers_that_went_cost_nothing(tiny: Tiny) -> None:
    bundle = bundle_of(tiny("bert", LABELS))
    both = flop_costs(bundle, 24), byte_costs(bundle)
    surgery.keep_layers(bundle.model, bundle.family, {"encoder": [0, 3]})
    shapes = surgery.shapes(bundle.model, bundle.family)
    assert both[0].total(shapes) == flops(bundle, 24)
    assert both[1].total(shapes) == 4 * sum(p.numel() for p in bundle.model.parameters())


def test_a_bert_by_hand(tiny: Tiny) -> None:
    """4 heads of 8, width 32, 64 neurons."""
    costs = flop_costs(bundle_of(tiny("bert", LABELS)), 10)
    head, neuron = 2 * 10 * 4 * 32 * 8 + 4 * 8 * 10**2, 2 * 10 * 2 * 32
    assert costs.block == {"encoder": head + neuron}
    assert costs.base == 2 * (32 * 32 + 32 * 2)
    np.testing.assert_array_equal(costs.curves[Kind("encoder", 0)][1:], head * np.arange(4))
    np.testing.assert_array_equal(costs.curves[Kind("encoder")][1:], neuron * np.arange(64))
    assert costs.curves[Kind("encoder", 0)][0] == -head  # the block that keeps one unit of each, less its head
    assert costs.curves[Kind("encoder")][0] == -neuron
    assert np.isnan(flop_costs(bundle_of(tiny("gpt2", LABELS)), 10).curves[Kind("decoder")][0])
    size = byte_costs(bundle_of(tiny("bert", LABELS)))
    assert size.curves[Kind("encoder", 0)][2] == 4 * (4 * 32 * 8 + 3 * 8)
    assert size.curves[Kind("encoder")][2] == 4 * (2 * 32 + 1)


def test_the_sum_by_hand() -> None:
    curves = {
        Kind("encoder", 0): np.array([np.nan, 0.0, 5.0]),
        Kind("encoder"): np.array([np.nan, 0.0, 0.5, 2.0]),
        Kind("decoder"): np.array([np.nan, 0.0, 0.25]),
    }
    costs = Costs("ms", 10.0, {"encoder": 1.0, "decoder": 2.0}, curves)
    shapes = {
        "encoder": (BlockShape(heads=((3, 4),), neurons=3), BlockShape(heads=((0,),), neurons=2)),
        "decoder": (BlockShape(heads=(), neurons=2),),
    }
    assert costs.total(shapes) == 10 + 2 * 1 + 2 + (5 + 2) + (0 + 0.5) + 0.25


def test_units_are_the_most_of_any_block() -> None:
    shapes = {"decoder": (BlockShape(heads=((1,), (0, 2)), neurons=7), BlockShape(heads=((1, 2, 3), (0,)), neurons=5))}
    assert most_units(shapes) == {Kind("decoder", 0): 3, Kind("decoder", 1): 2, Kind("decoder"): 7}
    assert [kept(shapes["decoder"][0], kind) for kind in most_units(shapes)] == [1, 2, 7]
    assert str(Kind("encoder")) == "encoder neurons"
    assert str(Kind("decoder", 1)) == "decoder heads of attention 1"
