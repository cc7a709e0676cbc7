"""What an engine really ran: from its own profile, put down to the right weights, told in sentences that follow from it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import tiny as families
from engine_cases import LABELS, arrays_of, bundle_of, quantize
from flyweight.artifact import QuantizedTensor
from flyweight.engines import kernels, openvino
from flyweight.engines import onnxruntime as engine
from flyweight.engines.kernels import Kernel, parameter_named, profile, report, weights_read
from flyweight.engines.openvino_kernels import owners
from flyweight.errors import EngineError
from flyweight.methods.quantize.grid import Grid
from flyweight.models.bundle import Bundle
from flyweight.models.surgery import linears

Tiny = Callable[..., Path]
needs_openvino = pytest.mark.skipif(openvino.available() is not None, reason=f"{openvino.available()}")
BOTH = ["onnxruntime", pytest.param("openvino", marks=needs_openvino)]


def blocks_of(bundle: Bundle) -> list[str]:
    return [f"{name}.weight" for name in linears(bundle.model, bundle.family)]


def info(bits: int) -> QuantizedTensor:
    return QuantizedTensor(shape=(2, 2), bits=bits, scheme="symmetric", granularity="channel")


def export(bundle: Bundle, folder: Path) -> Path:
    return folder / engine.export(bundle, folder).file


@pytest.mark.parametrize("family", families.ENCODERS)
def test_every_dynamic_linear_is_seen_in_an_integer_kernel(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = quantize(bundle_of(tiny(family, labels=LABELS)), Grid(8), "dynamic")
    ran = profile("onnxruntime", export(bundle, tmp_path), arrays_of(bundle)[0], runs=2)
    found = report(ran, blocks_of(bundle), {}, "onnxruntime")
    modules = bundle.model.named_modules()
    assert set(found.linears) == {f"{name}.weight" for name, module in modules if isinstance(module, nn.Linear)}
    kinds = {run.kernel for run in found.linears.values()}
    assert kinds <= {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
    assert {run.precision for run in found.linears.values()} == {"int8"}
    count = len(blocks_of(bundle))
    assert found.text[0].startswith(f"{count} of {count} linears of the blocks ran in integer kernels of onnxruntime")
    assert sum(total.share for total in found.totals) == pytest.approx(1)


@pytest.mark.parametrize("name", BOTH)
def test_a_float_model_has_no_integer_product(tiny: Tiny, tmp_path: Path, name: str) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    ran = profile(name, export(bundle, tmp_path), arrays_of(bundle)[0], runs=2)
    found = report(ran, blocks_of(bundle), {}, name)
    assert len(found.linears) == len(blocks_of(bundle)) + 2  # pooler and classifier
    assert {run.precision for run in found.linears.values()} == {"fp32"}
    assert len(found.text) == 1
    assert f"ran in float kernels of {name}" in found.text[0]


@pytest.mark.parametrize("name", BOTH)
def test_weights_only_are_said_to_run_in_float(tiny: Tiny, tmp_path: Path, name: str) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(4, "asymmetric"), "none")
    quantized = {name: codes.info for name, codes in bundle.quantized.items()}
    ran = profile(name, export(bundle, tmp_path), arrays_of(bundle)[0], runs=1)
    found = report(ran, blocks_of(bundle), quantized, name)
    assert set(blocks_of(bundle)) <= set(found.linears)
    float_runs = [run for run in found.linears.values() if run.precision == "fp32"]
    if len(float_runs) == len(found.linears):
        count = len(blocks_of(bundle))
        assert found.text[1].startswith(f"{count} linears stored in 4 bits ran in float: smaller on disk, not faster")
    else:  # packed products: their sentence says what they are good for
        assert "stay packed" in found.text[1]


@needs_openvino
def test_openvino_computes_dynamic_int8_in_float_and_says_so(tiny: Tiny, tmp_path: Path) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(8), "dynamic")
    ran = profile("openvino", export(bundle, tmp_path), arrays_of(bundle)[0], runs=1)
    found = report(ran, blocks_of(bundle), {n: c.info for n, c in bundle.quantized.items()}, "openvino")
    assert set(blocks_of(bundle)) <= set(found.linears)
    assert {run.precision for run in found.linears.values()} == {"fp32"}
    assert "Integer kernels of openvino take int8 with activations static" in found.text[1]


def static_pair() -> onnx.ModelProto:
    """Two linears of 128 x 128 on fixed uint8 grids, a bias and a Relu between them."""
    rng = np.random.default_rng(0)
    stored: dict[str, Any] = {
        "step": np.float32(0.02), "zero": np.uint8(128), "scale": np.full(128, 0.01, np.float32),
        "none": np.zeros(128, np.int8), "bias": np.ones(128, np.float32),
    }  # fmt: skip
    nodes, x = [], "x"
    for number, out in enumerate(("h", "y")):
        weight = f"model.block.{number}.weight"
        stored[f"{weight}.codes"] = rng.integers(-127, 128, (128, 128)).astype(np.int8)
        nodes += [
            helper.make_node("QuantizeLinear", [x, "step", "zero"], [f"{x}.uint8"]),
            helper.make_node("DequantizeLinear", [f"{x}.uint8", "step", "zero"], [f"{x}.rounded"]),
            helper.make_node("DequantizeLinear", [f"{weight}.codes", "scale", "none"], [f"{weight}.float32"], axis=1),
            helper.make_node(
                "MatMul", [f"{x}.rounded", f"{weight}.float32"], [f"{out}.product"], name=f"/{number}/MatMul"
            ),
            helper.make_node(
                "Add", [f"{out}.product", "bias"], [out if number else f"{out}.sum"], name=f"/{number}/Add"
            ),
        ]
        if not number:
            nodes.append(helper.make_node("Relu", ["h.sum"], ["h"], name="/relu"))
        x = out
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "static", [value("x", TensorProto.FLOAT, ["n", "t", 128])], [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


@pytest.mark.parametrize("name", BOTH)
def test_static_grids_run_in_integer_kernels(tmp_path: Path, name: str) -> None:
    path = tmp_path / "static.onnx"
    onnx.save_model(static_pair(), str(path))
    x = {"x": np.random.default_rng(1).normal(size=(1, 8, 128)).astype(np.float32)}
    found = report(profile(name, path, x, runs=2), ["block.0.weight", "block.1.weight"], {}, name)
    assert set(found.linears) == {"block.0.weight", "block.1.weight"}
    assert {run.precision for run in found.linears.values()} == {"int8"}


@pytest.mark.parametrize(("level", "precision"), [(0, "fp32"), (4, "int8")])
def test_packed_products_compute_in_what_the_file_asks_for(tmp_path: Path, level: int, precision: str) -> None:
    rng = np.random.default_rng(0)
    stored = {
        "model.l.weight.codes": rng.integers(0, 256, (64, 2, 16)).astype(np.uint8),
        "model.l.weight.scale": rng.uniform(0.01, 0.02, (64, 2)).astype(np.float32),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *stored], ["y"], domain="com.microsoft", name="product",
        K=64, N=64, bits=4, block_size=32, accuracy_level=level,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "packed", [value("x", TensorProto.FLOAT, ["n", 64])], [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets)
    model.ir_version = 8
    onnx.save_model(model, str(tmp_path / "packed.onnx"))
    ran = profile("onnxruntime", tmp_path / "packed.onnx", {"x": np.ones((3, 64), np.float32)}, runs=1)
    assert [(kernel.kernel, kernel.precision, kernel.parameters) for kernel in ran] == [
        ("MatMulNBits", precision, ("l.weight",))
    ]


def test_profiling_leaves_nothing_behind(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    path = export(bundle, tmp_path / "model")
    (tmp_path / "here").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    profile("onnxruntime", path, arrays_of(bundle)[0], runs=1)
    if openvino.available() is None:
        profile("openvino", path, arrays_of(bundle)[0], runs=1)
    files = [found for found in tmp_path.rglob("*") if found.is_file()]
    assert files == [path]


def test_an_engine_without_a_profile() -> None:
    with pytest.raises(EngineError, match="profile of its kernels .onnxruntime, openvino., got 'torch'"):
        profile("torch", Path("x"), {})


def test_a_file_that_does_not_run(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(EngineError, match="expected an ONNX file that onnxruntime"):
        profile("onnxruntime", tmp_path / "model.onnx", {}, runs=1)


@pytest.mark.parametrize(
    ("initializer", "parameter"),
    [
        ("model.bert.pooler.dense.weight.codes", "bert.pooler.dense.weight"),
        ("model.bert.pooler.dense.weight", "bert.pooler.dense.weight"),
        ("model.weight.scale", "weight"),
        ("model.bert.pooler.dense.bias", None),
        ("model.weights.other", None),
        ("table.4.-8.1", None),
    ],
)
def test_names_of_weights(initializer: str, parameter: str | None) -> None:
    assert parameter_named(initializer) == parameter


def chain() -> onnx.GraphProto:
    """x @ (codes as float) + bias, gelu-like, plus a residual; then scores of two activations."""
    nodes = [
        helper.make_node("Cast", ["model.a.weight.codes"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["float", "model.a.weight.scale"], ["a"]),
        helper.make_node("MatMul", ["x", "a"], ["product"], name="/a/MatMul"),
        helper.make_node("Add", ["product", "bias"], ["sum"], name="/a/Add"),
        helper.make_node("Erf", ["sum"], ["erf"]),
        helper.make_node("Mul", ["sum", "erf"], ["gelu"], name="/gelu"),
        helper.make_node("Add", ["gelu", "x"], ["residual"], name="/residual"),
        helper.make_node("MatMul", ["residual", "model.b.weight"], ["b"], name="/b/MatMul"),
        helper.make_node("Add", ["residual", "b"], ["both"], name="/both"),
        helper.make_node("MatMul", ["residual", "b"], ["scores"], name="/scores"),
    ]
    names = ("model.a.weight.codes", "model.a.weight.scale", "model.b.weight", "bias")
    stored = [numpy_helper.from_array(np.ones((2, 2), np.float32), name) for name in names]
    return helper.make_graph(nodes, "chain", [], [], stored)


def test_weights_are_found_through_constant_nodes() -> None:
    assert weights_read(chain()) == {"/a/MatMul": ("a.weight",), "/b/MatMul": ("b.weight",)}


def test_what_follows_a_product_belongs_to_it() -> None:
    found = owners(chain())
    for name in ("/a/MatMul", "product", "/a/Add", "sum", "erf", "/gelu", "residual", "/residual"):
        assert found[name] == ("a.weight",), name
    assert found["/b/MatMul"] == ("b.weight",)
    assert not {"/both", "both", "/scores", "scores", "a", "float"} & set(found)  # of two products, of none, a constant


def row(kernel: str, precision: str, seconds: float, *parameters: str) -> Kernel:
    return Kernel(f"{kernel}{seconds}", kernel, kernel, precision, parameters, seconds)


def test_the_report_adds_up() -> None:
    ran = [
        row("QLinearMatMul", "int8", 3.0, "a.weight"),
        row("MatMul", "fp32", 1.0, "a.weight"),  # its outlying channels
        row("QLinearMatMul", "int8", 2.0, "b.weight", "c.weight"),  # two in one
        row("MatMul", "fp32", 2.0, "d.weight"),
        row("Softmax", "fp32", 2.0),
    ]
    found = report(
        ran, ["a.weight", "b.weight", "c.weight", "d.weight", "e.weight"], {"d.weight": info(3)}, "onnxruntime"
    )
    assert found.linears["a.weight"].model_dump() == {
        "kernel": "QLinearMatMul + MatMul",
        "precision": "int8 + fp32",
        "share": 0.4,
    }
    assert found.linears["b.weight"].share == found.linears["c.weight"].share == pytest.approx(0.1)
    assert [(t.kernel, t.nodes, round(t.share, 3)) for t in found.totals] == [
        ("QLinearMatMul", 2, 0.5), ("MatMul", 2, 0.3), ("Softmax", 1, 0.2),
    ]  # fmt: skip
    assert found.text == (
        "3 of 5 linears of the blocks ran in integer kernels of onnxruntime (2 QLinearMatMul, 1 QLinearMatMul + MatMul); "
        "all linears of the blocks together took 80% of the time.",
        "1 linears of the blocks were not found in its profile.",
        "1 linears stored in 3 bits ran in float: smaller on disk, not faster than int8. "
        "Integer kernels of onnxruntime take int8 with activations dynamic or static.",
    )


@pytest.mark.parametrize(
    ("kernel", "precision", "bits", "said"),
    [
        ("MatMulIntegerToFloat", "int8", 8, None),
        ("MatMulIntegerToFloat", "int8", 7, None),
        ("MatMulIntegerToFloat", "int8", 2, "2/8 of int8's bytes on disk, its speed and memory"),
        ("MatMulIntegerToFloat", "int8", 1, "stored in 1 bit are made int8 when the file is loaded"),
        ("MatMulNBits", "int8", 4, "stay packed and are unpacked in every run"),
        ("MatMul", "fp32", 8, "ran in float: smaller on disk, not faster than int8"),
    ],
)
def test_a_format_that_is_not_faster_is_said_to_be(kernel: str, precision: str, bits: int, said: str | None) -> None:
    found = report([row(kernel, precision, 1.0, "a.weight")], ["a.weight"], {"a.weight": info(bits)}, "onnxruntime")
    assert len(found.text) == 1 + (said is not None)
    if said:
        assert said in found.text[1]


def test_profilers_are_engines() -> None:
    from flyweight.engines.engine import ENGINES

    assert set(kernels.PROFILERS) <= set(ENGINES)
    assert set(kernels.PROFILERS) == set(kernels.INTEGER_ACTIVATIONS)
