"""Seven bits for linears where integer kernels add pairs of products in 16 bits: the arithmetic, and what onnxruntime makes of it."""

from __future__ import annotations

import itertools
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from engine_cases import LABELS, arrays_of, bundle_of
from flyweight import parity
from flyweight.context import Context
from flyweight.engines import onnxruntime as engine
from flyweight.methods.quantize import quantize, work
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models.bundle import Bundle
from flyweight.settings import QuantizeSettings
from flyweight.tasks import task_named

Tiny = Callable[..., Path]


def pairs_in_16_bits(x: NDArray[np.uint8], w: NDArray[np.int8]) -> NDArray[np.int32]:
    """x [rows, in] times w [in, out] as PMADDUBSW and PMADDWD do it: sums of two products saturate, then 32 bits."""
    wide = x.astype(np.int64)[:, :, None] * w.astype(np.int64)[None]
    pairs = wide[:, 0::2] + wide[:, 1::2]
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(1).astype(np.int32)


def stored(bits: int, scheme: str) -> NDArray[np.int8]:
    """Integers as the engine's file holds them, of a weight whose extremes are met in neighbours."""
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    weight[:, :2] = weight.abs().max()
    weight[:, 2:4] = -weight.abs().max()
    codes = quantize_weight(weight, Grid(bits, scheme))  # type: ignore[arg-type]
    return (codes.codes.numpy().astype(np.int16) - 2 ** (bits - 1)).astype(np.int8).T


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [7, 8])
def test_no_pair_of_seven_bits_saturates(bits: int, scheme: str) -> None:
    w = stored(bits, scheme)
    assert w.max() == 2 ** (bits - 1) - 1
    x = np.random.default_rng(0).integers(0, 256, (64, 16)).astype(np.uint8)
    x[0] = 255
    exact = x.astype(np.int32) @ w.astype(np.int32)
    assert (pairs_in_16_bits(x, w) == exact).all() == (bits == 7)


def test_the_bound_itself() -> None:
    for one, other in itertools.product((-64, 63), repeat=2):
        assert -(2**15) <= 255 * one + 255 * other < 2**15
    assert 2 * 255 * 127 >= 2**15
    assert 2 * 255 * 65 >= 2**15  # beyond what onnxruntime leaves to this kernel, -64..64


def step(tiny: Tiny, tmp_path: Path, settings: QuantizeSettings) -> tuple[Bundle, Context]:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    context = Context(
        task=task_named("text-classification"),
        seed=0,
        work=tmp_path,
        reference=lambda: bundle,
        load=lambda name: bundle,
    )
    return quantize(bundle, settings, context), context


@pytest.mark.parametrize(
    ("settings", "saturates", "bits"),
    [
        ({"reduce_range": "auto"}, True, 7),
        ({"reduce_range": "auto"}, False, 8),
        ({"reduce_range": "on"}, False, 7),
        ({"reduce_range": "off"}, True, 8),
        ({"reduce_range": "on", "scheme": "asymmetric"}, False, 7),
        ({"reduce_range": "on", "activations": "none"}, True, 8),  # its products are no integers
        ({"reduce_range": "on", "bits": 4}, True, 4),
    ],
    ids=str,
)
def test_which_bits_linears_get(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], saturates: bool, bits: int
) -> None:
    monkeypatch.setattr(work, "saturates", lambda: saturates)
    bundle, context = step(tiny, tmp_path, QuantizeSettings.read(settings, "quantize"))
    modules = dict(bundle.model.named_modules())
    head = 7 if bits in (4, 7) else 8
    for name, codes in bundle.quantized.items():
        inside = ".encoder." in name
        table = isinstance(modules[name.removesuffix(".weight")], nn.Embedding)
        assert codes.info.bits == (8 if table else bits if inside else head), name
    assert context.notes.get("reduced_range") == (7 if bits == 7 else None)


def test_the_file_answers_as_torch(tiny: Tiny, tmp_path: Path) -> None:
    bundle, _ = step(tiny, tmp_path, QuantizeSettings(reduce_range="on"))
    parity.check(bundle, tmp_path, engine.export(bundle, tmp_path), arrays_of(bundle))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x64 has kernels that saturate")
@pytest.mark.parametrize(("choice", "kept"), [("on", True), ("off", False)])
def test_onnxruntime_leaves_seven_bits_to_its_fast_kernel(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str, kept: bool
) -> None:
    """Asked for exact sums, it turns int8 weights beyond -64..64 into uint8, for a slower kernel."""
    monkeypatch.setattr(engine, "saturates", lambda: True)
    bundle, _ = step(tiny, tmp_path, QuantizeSettings(reduce_range=choice))  # type: ignore[arg-type]
    options = engine.session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    path = tmp_path / engine.export(bundle, tmp_path).file
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(str(tmp_path / "optimized.onnx")).graph
    types = {
        tensor.data_type
        for tensor in graph.initializer
        if "weight.codes" in tensor.name and "embeddings" not in tensor.name
    }
    assert types == {onnx.TensorProto.INT8 if kept else onnx.TensorProto.UINT8}
