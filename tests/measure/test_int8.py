"""What is timed as int8 is what the `quantize` step stores: the same weights, bits, grids, and here even the same integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

import torch

from engine_cases import LABELS, bundle_of
from flyweight.measure.int8 import in_int8
from flyweight.methods.quantize import quantize
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
