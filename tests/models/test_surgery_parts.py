"""Attention and feed-forward parts that go altogether: what is left is the bias, in memory, on disk and in the ONNX file."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModel

import tiny as tiny_models
from engine_cases import LABELS, arrays_of, bundle_of, quantize, torch_answers
from flyweight import parity
from flyweight.artifact import write_manifest
from flyweight.engines import onnx_export
from flyweight.engines import onnxruntime as engine
from flyweight.methods.quantize.grid import Grid
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.models.families import family_of
from flyweight.models.storage import restore, save
from surgery_cases import close, differs, outputs, rebuilt

Tiny = Callable[..., Path]
FAMILIES = [name for name in tiny_models.FAMILIES if name != "gpt2"]


def silence(linear: Any) -> None:
    """It reads nothing any more; its bias stays."""
    linear.weight.data.zero_()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["one", "first", "all"])
def test_an_attention_that_is_gone_is_one_that_is_silenced(tiny: Tiny, family: str, where: str) -> None:
    cut, silenced = (AutoModel.from_pretrained(tiny(family)).eval() for _ in range(2))
    whole, row = outputs(cut), family_of(cut.config)
    for name, stack in surgery.stacks(cut, row).items():
        blocks = surgery.blocks(silenced, row)[name]
        for number in {"one": [1], "first": [0], "all": range(len(blocks))}[where]:
            for attention, paths in enumerate(stack.attention):
                silence(blocks[number].get_submodule(paths.o))
                surgery.keep_heads(cut, row, name, number, attention, [])
                left = surgery.blocks(cut, row)[name][number]
                assert surgery.layout(left, paths).units == 0
                assert surgery.weight_2d(left.get_submodule(paths.o)).numel() == 0
    close(outputs(cut), outputs(silenced))
    differs(outputs(cut), whole)
    close(outputs(copy.deepcopy(cut)), outputs(silenced))
    assert surgery.sync_config(cut, row) is False
    close(outputs(rebuilt(cut, row)), outputs(silenced))
    surgery.keep_layers(cut, row, {name: [0, 1] for name in surgery.stacks(cut, row)})  # it goes on being cut
    surgery.keep_layers(silenced, row, {name: [0, 1] for name in surgery.stacks(cut, row)})
    close(outputs(cut), outputs(silenced))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["one", "all"])
def test_a_feed_forward_part_that_is_gone_is_one_that_is_silenced(tiny: Tiny, family: str, where: str) -> None:
    cut, silenced = (AutoModel.from_pretrained(tiny(family)).eval() for _ in range(2))
    whole, row = outputs(cut), family_of(cut.config)
    neurons = {name: getattr(cut.config, stack.neurons_key) for name, stack in surgery.stacks(cut, row).items()}
    for name, stack in surgery.stacks(cut, row).items():
        blocks = surgery.blocks(silenced, row)[name]
        for number in [2] if where == "one" else range(len(blocks)):
            silence(surgery.mlp_linears(blocks[number], stack)[1])
            surgery.keep_neurons(cut, row, name, number, [])
    close(outputs(cut), outputs(silenced))
    differs(outputs(cut), whole)
    assert surgery.sync_config(cut, row) is False
    assert all(getattr(cut.config, surgery.stacks(cut, row)[name].neurons_key) == n for name, n in neurons.items())
    close(outputs(rebuilt(cut, row)), outputs(silenced))


def test_linears_without_weights_are_none(tiny: Tiny) -> None:
    """Nobody is offered a weight that is not there."""
    bundle = without_parts(bundle_of(tiny("bert", labels=LABELS)))
    names = list(surgery.linears(bundle.model, bundle.family))
    assert len(names) == 4 * 6 - 4 - 2 - 6
    assert not [
        name for name in names if ".1.attention" in name or ".2.intermediate" in name or ".layer.2.output" in name
    ]


def without_parts(bundle: Bundle) -> Bundle:
    """Block 1 without attention, block 2 without neurons, block 3 without both (Llama: its units are pairs of heads)."""
    (name,) = surgery.blocks(bundle.model, bundle.family)
    for block in (1, 3):
        surgery.keep_heads(bundle.model, bundle.family, name, block, 0, [])
    for block in (2, 3):
        surgery.keep_neurons(bundle.model, bundle.family, name, block, [])
    surgery.keep_heads(bundle.model, bundle.family, name, 2, 0, [1])
    return bundle


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("family", [*tiny_models.ENCODERS, "llama"])
def test_files_without_parts_answer_as_torch(tiny: Tiny, tmp_path: Path, family: str, precision: str) -> None:
    bundle = without_parts(bundle_of(tiny(family, labels=LABELS)))
    if precision == "int8":
        bundle = quantize(bundle, Grid(8), "dynamic", Grid(8))
    arrays = arrays_of(bundle)
    wanted = [torch_answers(bundle, one) for one in arrays]
    write_manifest(tmp_path / "saved", save(bundle, tmp_path / "saved"))
    again = restore(tmp_path / "saved")
    for one, answer in zip(arrays, wanted, strict=True):
        np.testing.assert_array_equal(torch_answers(again, one), answer)
    entry = onnx_export.export(again, tmp_path)
    model = onnx.load(str(tmp_path / entry.file))
    empty = [tensor.name for tensor in model.graph.initializer if 0 in tensor.dims]
    assert not empty, f"weights of nothing in the file: {empty}"
    parity.check(bundle, tmp_path, entry, arrays)  # raises where it answers otherwise
    with contextlib.closing(engine.open_file(tmp_path / entry.file)) as predictor:
        if precision == "fp32":
            for one, answer in zip(arrays, wanted, strict=True):
                np.testing.assert_allclose(predictor.run(one), answer, atol=1e-4, rtol=1e-4)


def test_training_goes_on_where_parts_are_gone(tiny: Tiny) -> None:
    bundle = without_parts(bundle_of(tiny("mpnet", labels=LABELS)))
    bundle.model.train()
    out = bundle.model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([1]))
    out.loss.backward()
    o = bundle.model.get_submodule("mpnet.encoder.layer.1.attention.attn.o")
    assert float(o.bias.grad.abs().sum()) > 0
