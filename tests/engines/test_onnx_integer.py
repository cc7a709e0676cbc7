"""The integer forms against the same arithmetic written out in numpy, number by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from flyweight.engines.onnx_integer import Draft, float_weight, quantized_embedding, quantized_linear
from flyweight.engines.onnxruntime import session_options
from flyweight.errors import ExportError
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models.bundle import Codes

GRIDS = [
    *[Grid(bits, "symmetric", shared) for bits in range(2, 9) for shared in ("tensor", "channel")],
    *[Grid(bits, "asymmetric", shared) for bits in range(1, 9) for shared in ("tensor", "channel")],
    Grid(1, "binary", "tensor"),
    Grid(1, "binary", "channel"),
]
GROUPED = [Grid(3, "symmetric", "group", 7), Grid(4, "asymmetric", "group", 3), Grid(1, "binary", "group", 7)]
SLOTS = {1: 1, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
OUT, IN = 5, 21  # neither a multiple of anything that is packed


def codes_of(grid: Grid, mask: bool = False) -> Codes:
    torch.manual_seed(grid.bits)
    weight = torch.randn(OUT, IN)
    return quantize_weight(weight, grid, weight.abs() > 0.4 if mask else None)


def integer_parts(codes: Codes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(integer - zero point, scale), each [out, in], from the definition in `Codes`."""
    values, scales = np.zeros((OUT, IN), np.int64), np.zeros((OUT, IN), np.float32)
    for i in range(OUT):
        for j in range(IN):
            place = (0,) if codes.info.granularity == "tensor" else (i, 0)
            if codes.info.granularity == "group":
                place = (i, j // codes.info.group_size)
            code = int(codes.codes[i, j])
            if codes.info.scheme == "symmetric":
                values[i, j] = code - 2 ** (codes.info.bits - 1)
            elif codes.info.scheme == "binary":
                values[i, j] = 1 if code else -1
            else:
                values[i, j] = code - int(codes.zero_point[place])
            if codes.mask is not None and not codes.mask[i, j]:
                values[i, j] = 0
            scales[i, j] = codes.scale[place]
    return values, scales


def run(draft: Draft, name: str, array: np.ndarray[Any, Any], output: str = "y") -> Any:
    kind = TensorProto.FLOAT if array.dtype == np.float32 else TensorProto.INT64
    graph = helper.make_graph(
        draft.nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, array.shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
        list(draft.initializers.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(threads=1), providers=["CPUExecutionProvider"]
    )
    return session.run([output], {name: array})[0]


def slow_dynamic_quantize(x: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.float32, int]:
    """ONNX's definition of DynamicQuantizeLinear."""
    low, high = np.minimum(x.min(), np.float32(0)), np.maximum(x.max(), np.float32(0))
    scale = np.float32((high - low) / np.float32(255))
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    values = [min(max(int(np.rint(v / scale)) + zero, 0), 255) for v in x.flatten()]
    return np.array(values).reshape(x.shape), scale, zero


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_dynamic_linear_is_integer_arithmetic(grid: Grid, mask: bool) -> None:
    codes = codes_of(grid, mask)
    x = np.random.default_rng(0).normal(size=(2, 3, IN)).astype(np.float32)
    draft = Draft()
    quantized_linear(draft, "x", "w", codes, output="y")

    values, scales = integer_parts(codes)
    activations, x_scale, x_zero = slow_dynamic_quantize(x)
    sums = np.zeros((2, 3, OUT), np.int64)
    for place in np.ndindex(2, 3, OUT):
        for k in range(IN):
            sums[place] += (int(activations[place[0], place[1], k]) - x_zero) * int(values[place[2], k])
    np.testing.assert_allclose(run(draft, "x", x), sums * (x_scale * scales[:, 0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("grid", [*GRIDS, *GROUPED], ids=str)
def test_a_weights_only_linear_multiplies_what_the_codes_mean(grid: Grid, mask: bool) -> None:
    codes = codes_of(grid, mask)
    x = np.random.default_rng(0).normal(size=(4, IN)).astype(np.float32)
    draft = Draft()
    draft.add("MatMul", ["x", float_weight(draft, "w", codes)], "y")
    values, scales = integer_parts(codes)
    np.testing.assert_allclose(run(draft, "x", x), x @ (values * scales).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(run(draft, "x", x, "w.float32"), (values * scales).T.astype(np.float32))


@pytest.mark.parametrize("grid", [*GRIDS, *GROUPED], ids=str)
def test_an_embedding_looks_up_what_the_codes_mean(grid: Grid) -> None:
    codes = codes_of(grid)
    draft = Draft()
    quantized_embedding(draft, "ids", "w", codes, "y")
    ids = np.array([[0, 4, 2], [3, 3, 1]])
    values, scales = integer_parts(codes)
    np.testing.assert_array_equal(run(draft, "ids", ids), (values * scales).astype(np.float32)[ids])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_table_tied_to_a_linear_means_the_same_to_both(grid: Grid) -> None:
    codes, ids = codes_of(grid), np.array([[0, 4, 2], [3, 3, 1]])
    draft = Draft(tables={"w"})
    quantized_embedding(draft, "ids", "w", codes, "y", tied=True)
    float_weight(draft, "w", codes)
    values, scales = integer_parts(codes)
    weight = (values * scales).astype(np.float32)
    np.testing.assert_array_equal(run(draft, "ids", ids), weight[ids])
    np.testing.assert_array_equal(run(draft, "ids", ids, "w.float32"), weight.T)


@pytest.mark.parametrize("mask", [False, True], ids=["whole", "pruned"])
@pytest.mark.parametrize("grid", [*GRIDS, *GROUPED], ids=str)
def test_nothing_is_stored_wider_than_its_slot(grid: Grid, mask: bool) -> None:
    codes = codes_of(grid, mask)
    size = 2 if grid.scheme == "binary" and mask else SLOTS[grid.bits]
    linear, table = Draft(), Draft()
    float_weight(linear, "w", codes)
    quantized_embedding(table, "ids", "w", codes, "y")
    bits = {3: [2, 1], 5: [4, 1]}.get(grid.bits, [size])
    planes = sum(OUT * -(-IN * bit // 8) for bit in bits)  # every row of every plane begins with a byte of its own
    if grid.bits in (4, 6, 7):
        planes = OUT * -(-IN // 8) * grid.bits
    for draft, expected in ((linear, -(-OUT * IN * size // 8)), (table, planes)):
        stored = [t for name, t in draft.initializers.items() if name.startswith("w.codes")]
        wide = size == 8 and (draft is linear or grid.bits == 8)
        assert {t.data_type for t in stored} == {TensorProto.INT8 if wide else TensorProto.UINT8}
        assert sum(len(t.raw_data) for t in stored) == expected
        floats = [t for t in draft.initializers.values() if t.data_type == TensorProto.FLOAT]
        floats = [t for t in floats if not t.name.startswith(("float.", "powers."))]  # for all tables of a grid
        assert [t.name for t in floats] == ["w.scale"]
        assert int(np.prod(floats[0].dims)) == codes.scale.numel()


def test_linears_with_one_input_share_its_quantization_and_one_weight_is_stored_once() -> None:
    draft, codes = Draft(), codes_of(Grid(4))
    for output in ("a", "b", "c"):
        quantized_linear(draft, "x", "w", codes, output=output)
    kinds = [node.op_type for node in draft.nodes]
    assert kinds.count("DynamicQuantizeLinear") == 1
    assert kinds.count("MatMulInteger") == 3
    assert [name for name in draft.initializers if name.endswith(".codes")] == ["w.codes"]
    assert len({output for node in draft.nodes for output in node.output}) == sum(len(n.output) for n in draft.nodes)


def test_groups_have_no_integer_kernel() -> None:
    with pytest.raises(ExportError, match=r"expected a scale per tensor or channel for w, got groups"):
        quantized_linear(Draft(), "x", "w", codes_of(GROUPED[0]), output="y")
