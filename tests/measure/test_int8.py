"""What is timed as int8 is what the `quantize` step stores: the same weights, bits, grids, and here even the same integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

import torch

from engine_cases import LABELS, bundle_of
from flyweight.measure.int8 import in_int8
from flyweight.measure.latency import Point, random_arrays
from flyweight.measure.race import Terms, ready
from flyweight.methods.quantize import quantize
from flyweight.models import surgery
from flyweight.settings import QuantizeSettings
from solver_cases import context

Tiny = Callable[..., Path]


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra", "mpnet", "gpt2"])
def test_it_is_what_the_step_makes(
    tiny: Tiny, tmp_path: Path, family: str, reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flyweight.measure.int8.saturates", lambda: reduced)
    monkeypatch.setattr("flyweight.methods.quantize.work.saturates", lambda: reduced)
    bundle = bundle_of(tiny(family, LABELS))
    before = {name: weight.clone() for name, weight in bundle.model.named_parameters()}
    made = in_int8(bundle)
    assert made.model is bundle.model
    assert not bundle.quantized
    assert all(torch.equal(weight, before[name]) for name, weight in bundle.model.named_parameters())
    stored = quantize(bundle_of(tiny(family, LABELS)), QuantizeSettings(), context(tmp_path))
    assert made.activations == stored.activations == "dynamic"
    assert set(made.quantized) == set(stored.quantized)
    for name, codes in stored.quantized.items():
        found = made.quantized[name]
        assert found.info == codes.info, name
        assert torch.equal(found.codes, codes.codes), name
        assert torch.equal(found.scale, codes.scale), name
    assert {codes.info.bits for codes in made.quantized.values()} == ({7, 8} if reduced else {8})


def test_a_row_of_zeros_has_a_scale(tiny: Tiny) -> None:
    bundle = bundle_of(tiny("bert", LABELS))
    bundle.model.classifier.weight.data[1] = 0
    codes = in_int8(bundle).quantized["classifier.weight"]
    assert float(codes.scale[1]) == 1.0
    assert set(codes.codes[1].tolist()) == {1 << (codes.info.bits - 1)}


def test_a_part_that_is_gone_has_no_integers_and_the_rest_runs(tiny: Tiny, tmp_path: Path) -> None:
    """Of attention 1 and of feed-forward part 2 only the biases are left."""
    bundle = bundle_of(tiny("bert", LABELS))
    surgery.keep_heads(bundle.model, bundle.family, "encoder", 1, 0, [])
    surgery.keep_neurons(bundle.model, bundle.family, "encoder", 2, [])
    whole = set(in_int8(bundle_of(tiny("bert", LABELS))).quantized)
    names = {name.removeprefix("bert.encoder.layer.") for name in whole - set(in_int8(bundle).quantized)}
    attention = {f"1.attention.{part}.weight" for part in ("self.query", "self.key", "self.value", "output.dense")}
    assert names == {*attention, "2.intermediate.dense.weight", "2.output.dense.weight"}
    model = ready(bundle, Terms(precision="int8", point=Point(1, 8)), tmp_path)
    arrays = random_arrays(Point(1, 8), 50, seed=0)
    found = model.run(arrays)
    model.close()
    with torch.no_grad():
        wanted = bundle.model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits.numpy()
    assert abs(found - wanted).max() < 0.1 * abs(wanted).max()
