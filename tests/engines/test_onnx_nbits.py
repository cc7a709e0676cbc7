"""MatMulNBits on our integers against the product of what the codes mean, and what it takes in the file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from flyweight.engines.onnx_integer import Draft
from flyweight.engines.onnx_nbits import DOMAIN, Slots, rounds_inputs, slots, weights_only_linear, with_level
from flyweight.engines.onnxruntime import session_options
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models.bundle import Codes
from flyweight.models.codes import dequantize, described

SCHEMES = [
    *[(bits, "symmetric") for bits in range(2, 9)],
    *[(bits, "asymmetric") for bits in range(1, 9)],
    (2, "ternary"),
    (1, "binary"),
]
SHARED: list[tuple[Any, int | None, int, int]] = [  # granularity, group, width, block of 4-bit slots
    ("tensor", None, 96, 32),
    ("channel", None, 96, 32),
    ("channel", None, 512, 256),
    ("channel", None, 21, 32),  # padded
    ("group", 16, 48, 16),
    ("group", 64, 128, 64),
    ("group", 48, 96, 16),  # no power of two, but a multiple of one
    ("group", 512, 1024, 256),
]
OUT = 7


def codes_of(scheme: str, bits: int, granularity: Any, group: int | None, width: int, mask: bool = False) -> Codes:
    torch.manual_seed(bits)
    weight = torch.randn(OUT, width) + 0.3
    return quantize_weight(weight, Grid(bits, scheme, granularity, group), weight.abs() > 0.4 if mask else None)  # type: ignore[arg-type]


def drafted(codes: Codes, exact: bool = False) -> onnx.ModelProto:
    draft, width = Draft(), codes.info.shape[1]
    weights_only_linear(draft, "x", "w", codes, "y", exact)
    graph = helper.make_graph(
        draft.nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "m", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m", OUT])],
        list(draft.initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)])
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, x: np.ndarray[Any, Any], level: int | None = None) -> Any:
    model = onnx.ModelProto.FromString(model.SerializeToString())
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and level is not None:
            node.CopyFrom(with_level(node, level))
    options = session_options(threads=1)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def inputs(width: int, rows: int = 3) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(size=(2, rows, width)).astype(np.float32)


def error(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("shared", SHARED, ids=str)
@pytest.mark.parametrize(("bits", "scheme"), SCHEMES)
def test_the_integers_are_ours(bits: int, scheme: str, shared: tuple[Any, int | None, int, int], mask: bool) -> None:
    granularity, group, width, block = shared
    codes = codes_of(scheme, bits, granularity, group, width, mask)
    model = drafted(codes)
    (node,) = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    options = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    assert options["bits"] == (4 if bits <= 4 else 8)
    assert options["block_size"] == (block if bits <= 4 else min(block, 32))
    wanted = dequantize(codes).numpy()
    for x in (inputs(width, 1)[:1], inputs(width, 3), inputs(width, 20)):  # one row has a kernel of its own
        assert error(run(model, x, level=0), x @ wanted.T) <= 2e-6
        assert error(run(model, x), x @ wanted.T) <= (2e-6 if bits <= 4 else 0.015)
    whole = np.eye(width, dtype=np.float32)[None]  # a product with one input at a time: the very weights
    np.testing.assert_array_equal(run(model, whole, level=0)[0].T, wanted)
    assert rounds_inputs(model.graph) == (bits > 4)


@pytest.mark.parametrize("shared", SHARED, ids=str)
@pytest.mark.parametrize(("bits", "scheme"), SCHEMES)
def test_k_bits_take_k_bits_in_the_file(bits: int, scheme: str, shared: tuple[Any, int | None, int, int]) -> None:
    granularity, group, width, _ = shared
    codes = codes_of(scheme, bits, granularity, group, width)
    how = slots(codes)
    assert isinstance(how, Slots)
    size = {1: 1, 2: 2, 3: 4, 4: 4}.get(bits, 8)
    stored = {tensor.name: tensor for tensor in drafted(codes).graph.initializer}
    assert len(stored["w.codes"].raw_data) == OUT * how.blocks * how.block * size // 8
    assert len(stored["w.scale"].raw_data) == codes.scale.numel() * 4
    zeros = stored.pop("w.blocks.zero_point", None)
    assert (zeros is None) == (codes.zero_point is None)
    if zeros is not None:
        assert len(zeros.raw_data) == OUT * -(-how.blocks * how.bits // 8)
    rest = [tensor for name, tensor in stored.items() if name not in ("w.codes", "w.scale")]
    assert sum(len(tensor.raw_data) for tensor in rest) <= 256 * 4 + 100  # how to unpack a byte, shapes


def test_smoothing_and_outliers() -> None:
    torch.manual_seed(0)
    smooth, outliers = torch.rand(96) + 0.5, torch.tensor([3, 50, 95])
    for bits, fits in ((4, 32), (8, 32), (4, 8)):
        weight = torch.randn(OUT, 96) * smooth
        weight[:, outliers] = 0
        codes = quantize_weight(weight, Grid(bits, "symmetric", "group", fits))
        codes = described(replace(codes, smooth=smooth, outliers=outliers, outlier_values=torch.randn(OUT, 3)))
        model, x = drafted(codes), inputs(96)
        assert ("MatMulNBits" in kinds(model)) == (fits == 32)
        assert error(run(model, x, level=0), x @ dequantize(codes).numpy().T) <= 2e-6


def test_exact_means_no_rounded_inputs() -> None:
    for bits in (4, 8):
        codes = codes_of("symmetric", bits, "channel", None, 96)
        model, x = drafted(codes, exact=True), inputs(96)
        assert not rounds_inputs(model.graph)
        assert error(run(model, x), x @ dequantize(codes).numpy().T) <= 2e-6


def test_what_does_not_fit_says_why_and_is_unpacked_at_load() -> None:
    codes = codes_of("asymmetric", 4, "group", 8, 96)
    assert slots(codes) == "groups of 8 are no multiple of 16"
    assert slots(codes_of("symmetric", 4, "channel", None, 21), table=True) == "rows of 21 are no multiple of 16"
    model, x = drafted(codes), inputs(96)
    assert "MatMulNBits" not in kinds(model)
    assert error(run(model, x), x @ dequantize(codes).numpy().T) <= 2e-6
