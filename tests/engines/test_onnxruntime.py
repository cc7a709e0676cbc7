"""Exported files: they answer as torch does, hold integers as integers, and run in integer kernels."""

from __future__ import annotations

import base64
import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import tiny as families
from engine_cases import LABELS, arrays_of, bundle_of, quantize, torch_answers
from flyweight import parity
from flyweight.artifact import Manifest, write_manifest
from flyweight.engines import onnx_export
from flyweight.engines import onnxruntime as engine
from flyweight.engines.onnx_nbits import with_level
from flyweight.engines.onnx_rewrite import put_weights
from flyweight.errors import EngineError, ExportError
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models.bundle import Bundle
from flyweight.models.codes import parameter_value
from flyweight.models.surgery import keep_heads, keep_layers_of, keep_neurons

Tiny = Callable[..., Path]

CASES: dict[str, Callable[[Bundle], Any]] = {
    "fp32": lambda bundle: None,
    "pruned": lambda bundle: cut(bundle),
    "int8-dynamic": lambda bundle: quantize(bundle, Grid(8), "dynamic"),
    "int8-asymmetric": lambda bundle: quantize(bundle, Grid(8, "asymmetric"), "dynamic", Grid(8, "asymmetric")),
    "weights-only-4": lambda bundle: quantize(bundle, Grid(4, "asymmetric", "group", 8), "none", Grid(4)),
    "weights-only-3-no-embeddings": lambda bundle: quantize(bundle, Grid(3), "none", None),
    "binary": lambda bundle: quantize(bundle, Grid(1, "binary"), "dynamic"),
    "binary-sparse": lambda bundle: quantize(bundle, Grid(1, "binary"), "dynamic", prune=0.5),
    "pruned-int8": lambda bundle: quantize(cut(bundle), Grid(8), "dynamic", Grid(2, "asymmetric")),
}


def cut(bundle: Bundle) -> Bundle:
    """Another number of heads and neurons in every block, and one block less."""
    keep_layers_of(bundle, {"encoder": [0, 1, 3]})
    for block, (heads, neurons) in enumerate((([1, 3], 30), ([0], 64), ([0, 1, 3], 7))):
        keep_heads(bundle.model, bundle.family, "encoder", block, 0, heads)
        keep_neurons(bundle.model, bundle.family, "encoder", block, list(range(neurons)))
    return bundle


def optimized(path: Path, target: Path) -> onnx.ModelProto:
    """The graph that onnxruntime makes of a file and really runs."""
    options = engine.session_options(1)
    options.optimized_model_filepath = str(target)
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return onnx.load(str(target))


def kinds(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", families.ENCODERS)
def test_the_file_answers_as_torch(tiny: Tiny, tmp_path: Path, family: str, case: str) -> None:
    bundle = bundle_of(tiny(family, labels=LABELS))
    CASES[case](bundle)
    entry = engine.export(bundle, tmp_path)
    assert entry.inputs == bundle.family.inputs
    assert entry.outputs == ("logits",)
    parity.check(bundle, tmp_path, entry, arrays_of(bundle))  # raises when it does not


@pytest.mark.parametrize("family", families.ENCODERS)
def test_fp32_answers_are_those_of_the_untouched_model(tiny: Tiny, tmp_path: Path, family: str) -> None:
    """Not through our own torch engine: the model as transformers has it, with its own attention and mask."""
    bundle = bundle_of(tiny(family, labels=LABELS))
    entry = engine.export(bundle, tmp_path)
    predictor = engine.open_file(tmp_path / entry.file)
    for arrays in arrays_of(bundle):
        np.testing.assert_allclose(predictor.run(arrays), torch_answers(bundle, arrays), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", families.ENCODERS)
def test_embeddings_of_a_headless_model(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = bundle_of(tiny(family), "embedding")
    entry = engine.export(bundle, tmp_path)
    predictor = engine.open_file(tmp_path / entry.file)
    for arrays in arrays_of(bundle):
        found = predictor.run(arrays)
        np.testing.assert_allclose(found, torch_answers(bundle, arrays), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1, rtol=1e-5)


def test_padding_changes_nothing_in_fp32(tiny: Tiny, tmp_path: Path) -> None:
    bundle = bundle_of(tiny("mpnet", labels=LABELS))
    predictor = engine.open_file(tmp_path / engine.export(bundle, tmp_path).file)
    examples = bundle.encoder.examples(["a quiet film", "the second half is better than the first , but it comes late"])
    both = predictor.run(examples.batch([0, 1], bundle.encoder.pad))
    alone = predictor.run(examples.batch([0], bundle.encoder.pad))
    np.testing.assert_allclose(both[0], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "activations", "size"),
    [
        (Grid(8), "dynamic", 8),
        (Grid(8, "asymmetric"), "none", 8),
        (Grid(4), "dynamic", 4),
        (Grid(3), "none", 4),
        (Grid(2, "asymmetric"), "dynamic", 2),
        (Grid(1, "binary"), "dynamic", 1),
    ],
    ids=str,
)
def test_quantized_weights_are_small_integers_in_the_file(
    tiny: Tiny, tmp_path: Path, grid: Grid, activations: str, size: int
) -> None:
    wide: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS, **wide)), grid, activations, grid)
    before = {name: parameter.numel() for name, parameter in bundle.model.named_parameters()}
    entry = engine.export(bundle, tmp_path)
    model = onnx.load(str(tmp_path / entry.file))
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, codes in bundle.quantized.items():
        parts = [tensor for other, tensor in stored.items() if other.startswith(f"model.{name}.codes")]
        assert {tensor.data_type for tensor in parts} <= {TensorProto.INT8, TensorProto.UINT8}
        slot = grid.bits if "embeddings" in name else size  # tables lie in planes, linears in slots
        assert sum(len(tensor.raw_data) for tensor in parts) == -(-codes.codes.numel() * slot // 8)
        assert len(stored[f"model.{name}.scale"].raw_data) == codes.scale.numel() * 4
        assert not any(other.startswith(f"model.{name}") and other.endswith("weight") for other in stored)
    # Floats: the scales, and what was never quantized, once.
    unpacking = sum(len(t.raw_data) for name, t in stored.items() if name.startswith("table."))  # what a byte means
    assert unpacking <= 256 * (4 + 8) * 4
    kept = [t for name, t in stored.items() if t.data_type == TensorProto.FLOAT and not name.startswith("table.")]
    floats = sum(len(t.raw_data) // 4 for t in kept)
    left = sum(count for name, count in before.items() if name not in bundle.quantized)
    scales = sum(codes.scale.numel() for codes in bundle.quantized.values())
    assert floats <= left + scales + 100
    assert not [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in stored]
    # The whole file: packed weights, floats, tables, and the graph (names and nodes, some 300 bytes each).
    packed = sum(codes.codes.numel() for codes in bundle.quantized.values()) * size // 8
    graph = len(model.graph.node) * 400
    assert (tmp_path / entry.file).stat().st_size <= packed + 4 * (left + scales) + 4096 + unpacking + graph


def test_a_float_file_holds_every_weight_once(tiny: Tiny, tmp_path: Path) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    entry = engine.export(bundle, tmp_path)
    model = onnx.load(str(tmp_path / entry.file))
    floats = sum(len(t.raw_data) // 4 for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
    assert floats <= sum(parameter.numel() for parameter in bundle.model.parameters()) + 100


@pytest.mark.parametrize("grid", [Grid(8), Grid(4, "asymmetric"), Grid(1, "binary")], ids=str)
def test_every_dynamic_linear_runs_in_an_integer_kernel(tiny: Tiny, tmp_path: Path, grid: Grid) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), grid, "dynamic")
    path = tmp_path / engine.export(bundle, tmp_path).file
    linears = sum(isinstance(module, torch.nn.Linear) for module in bundle.model.modules())
    written = kinds(onnx.load(str(path)))
    assert written["MatMulInteger"] == linears
    assert written["DynamicQuantizeLinear"] == linears - 2 * 4  # q, k, v of four blocks share theirs
    found = kinds(optimized(path, tmp_path / "optimized.onnx"))
    assert found["MatMulIntegerToFloat"] + found["DynamicQuantizeMatMul"] == linears
    assert found["MatMulInteger"] == found["Gemm"] == 0
    assert found["MatMul"] + found["FusedMatMul"] == 2 * 4  # scores and context


@pytest.mark.parametrize(
    "grid", [Grid(8), Grid(4, "asymmetric"), Grid(3, "symmetric", "group", 16), Grid(1, "binary")], ids=str
)
def test_weights_only_linears_stay_packed_in_memory(tiny: Tiny, tmp_path: Path, grid: Grid) -> None:
    plain = bundle_of(tiny("bert", labels=LABELS))
    expected = kinds(optimized(tmp_path / engine.export(plain, tmp_path).file, tmp_path / "plain.onnx"))
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), grid, "none", None)
    entry = engine.export(bundle, tmp_path)
    assert entry.precision == ("weights-only-int8-compute" if grid.bits == 8 else "weights-only")
    model = optimized(tmp_path / entry.file, tmp_path / "optimized.onnx")
    found = kinds(model)
    assert found["MatMulNBits"] == len(bundle.quantized)
    assert found["MatMul"] + found["FusedMatMul"] == 2 * 4  # scores and context
    for kind in ("Cast", "Sub", "Mul", "Gather", "Reshape", "Expand", "MatMulInteger"):
        assert found[kind] <= expected[kind], kind
    widest = max(
        (t for t in model.graph.initializer), key=lambda t: int(np.prod(t.dims)) * (t.data_type == TensorProto.FLOAT)
    )
    assert int(np.prod(widest.dims)) == max(
        p.numel() for n, p in bundle.model.named_parameters() if n not in bundle.quantized
    )


@pytest.mark.parametrize("grid", [Grid(8, "symmetric", "group", 8), Grid(4, "asymmetric", "group", 8)], ids=str)
def test_weights_only_that_fit_no_slots_are_made_float_once_when_loaded(tiny: Tiny, tmp_path: Path, grid: Grid) -> None:
    plain = bundle_of(tiny("bert", labels=LABELS))
    expected = kinds(optimized(tmp_path / engine.export(plain, tmp_path).file, tmp_path / "plain.onnx"))
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), grid, "none", None)
    path = tmp_path / engine.export(bundle, tmp_path).file
    found = kinds(optimized(path, tmp_path / "optimized.onnx"))
    matrices = ("MatMul", "Gemm", "FusedMatMul")
    assert sum(found[kind] for kind in matrices) == sum(expected[kind] for kind in matrices)
    for kind in ("Cast", "Sub", "Mul", "Gather", "Reshape", "DequantizeLinear"):
        assert found[kind] <= expected[kind], kind


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_heads_of_8_bits_are_exact_beside_blocks_of_fewer(tiny: Tiny, tmp_path: Path, bits: int) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(bits), "none")
    quantize(bundle, Grid(8), "none", None, skip="*encoder*")
    assert bundle.quantized["bert.pooler.dense.weight"].info.bits == 8
    entry = engine.export(bundle, tmp_path)
    assert entry.precision == "weights-only"
    assert parity.check(bundle, tmp_path, entry, arrays_of(bundle)) < 1e-5
    assert kinds(onnx.load(str(tmp_path / entry.file)))["MatMulNBits"] == 4 * 6


def test_heads_round_their_inputs_where_a_block_does(tiny: Tiny, tmp_path: Path) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(4), "none")
    quantize(bundle, Grid(8), "none", None, skip="*layer.[012].*")
    entry = engine.export(bundle, tmp_path)
    assert entry.precision == "weights-only-int8-compute"
    assert kinds(onnx.load(str(tmp_path / entry.file)))["MatMulNBits"] == 4 * 6 + 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_decoders_look_back_alone(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = bundle_of(tiny(family, labels=LABELS))
    assert parity.check(bundle, tmp_path, engine.export(bundle, tmp_path), arrays_of(bundle)) < 1e-5


def test_the_model_is_left_as_it_was(tiny: Tiny, tmp_path: Path) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    bundle.model.train()
    attention = bundle.model.config._attn_implementation
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    engine.export(bundle, tmp_path)
    assert bundle.model.training
    assert bundle.model.config._attn_implementation == attention == "sdpa"
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())


def test_equal_weights_of_two_layers_keep_their_own_treatment(tiny: Tiny, tmp_path: Path) -> None:
    """Exporters like to merge equal tensors; here one of two equal weights is quantized and the other is not."""
    bundle = bundle_of(tiny("bert", labels=LABELS))
    blocks = bundle.model.bert.encoder.layer
    blocks[1].load_state_dict(blocks[0].state_dict())
    quantize(bundle, Grid(2), "none", None, skip="*layer.1.*")
    blocks[1].output.dense.weight.data.copy_(blocks[0].output.dense.weight.data)  # equal again, one as codes
    entry = engine.export(bundle, tmp_path)
    parity.check(bundle, tmp_path, entry, arrays_of(bundle))
    stored = {tensor.name for tensor in onnx.load(str(tmp_path / entry.file)).graph.initializer}
    assert "model.bert.encoder.layer.0.output.dense.weight.codes" in stored
    assert "model.bert.encoder.layer.1.output.dense.weight" in stored


def test_a_weight_that_two_layers_share_is_stored_once(tiny: Tiny, tmp_path: Path) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    blocks = bundle.model.bert.encoder.layer
    blocks[1].output.dense.weight = blocks[0].output.dense.weight
    for treat in (lambda: None, lambda: quantize(bundle, Grid(8), "dynamic")):
        treat()
        entry = engine.export(bundle, tmp_path)
        parity.check(bundle, tmp_path, entry, arrays_of(bundle))
        stored = [tensor.name for tensor in onnx.load(str(tmp_path / entry.file)).graph.initializer]
        matrices = [name for name in stored if name.endswith((".output.dense.weight", ".output.dense.weight.codes"))]
        assert len([name for name in matrices if ".attention." not in name]) == 3


def test_weights_beyond_two_gigabytes_go_to_a_file_beside_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(8), "dynamic")
    monkeypatch.setattr(onnx_export, "EXTERNAL", 1000)
    for _ in range(2):  # the second export replaces the first
        entry = engine.export(bundle, tmp_path)
    names = [path.name for path in sorted((tmp_path / "onnx").iterdir())]
    assert names == ["model.onnx", "model.onnx.data"]
    parity.check(bundle, tmp_path, entry, arrays_of(bundle))


def graph_of(nodes: list[onnx.NodeProto], weight: list[int], width: int = 6) -> onnx.GraphProto:
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", width])]
    values.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, weight))
    return helper.make_graph(nodes, "test", values, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])


def answer(graph: onnx.GraphProto, x: Any) -> Any:
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 8
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("form", ["turned", "as it is", "gemm turned", "gemm"])
def test_all_ways_to_multiply_by_a_weight(form: str, quantized: bool) -> None:
    torch.manual_seed(0)
    codes = quantize_weight(torch.randn(4, 6), Grid(4))
    weight = (codes.codes.numpy().astype(np.float32) - 8) * codes.scale.numpy()  # [out, in]
    stored = weight if "turned" in form else np.ascontiguousarray(weight.T)
    if form == "turned":
        turn = helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0])
        nodes = [turn, helper.make_node("MatMul", ["x", "t"], ["y"])]
    elif form == "as it is":
        nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    else:
        bias = numpy_helper.from_array(np.arange(4, dtype=np.float32))
        nodes = [helper.make_node("Constant", [], ["b"], value=bias)]
        nodes.append(helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=int("turned" in form)))
    made = put_weights(graph_of(nodes, list(stored.shape)), {"w": stored}, {"w": codes} if quantized else {}, "none")
    x = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    expected = x @ weight.T + (np.arange(4) if "gemm" in form else 0)
    np.testing.assert_allclose(answer(made, x), expected, rtol=1e-5, atol=1e-5)
    assert "Transpose" not in [node.op_type for node in made.node]
    if quantized:
        assert {tensor.name for tensor in made.initializer} >= {"w.codes", "w.scale"}
        assert "w" not in {tensor.name for tensor in made.initializer}


def test_a_float_weight_read_both_ways_is_stored_once() -> None:
    """A table tied to the output layer: looked up by rows and multiplied with turned."""
    weight = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
    one = numpy_helper.from_array(np.array([0, 2, 4]))
    nodes = [
        helper.make_node("Constant", [], ["ids"], value=one),
        helper.make_node("Gather", ["w", "ids"], ["rows"]),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["product"]),
        helper.make_node("Add", ["product", "rows"], ["y"]),
    ]
    made = put_weights(graph_of(nodes, [6, 6]), {"w": weight}, {}, "none")
    x = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    np.testing.assert_allclose(answer(made, x), x @ weight.T + weight[[0, 2, 4]], rtol=1e-5, atol=1e-5)
    assert sum(len(t.raw_data) for t in made.initializer if t.data_type == TensorProto.FLOAT) == weight.nbytes


@pytest.mark.parametrize("activations", ["none", "dynamic"])
@pytest.mark.parametrize("size", [6, 32])
@pytest.mark.parametrize(
    "grid",
    [
        *[Grid(8), Grid(8, "asymmetric"), Grid(6), Grid(4), Grid(4, "asymmetric"), Grid(3), Grid(2), Grid(1, "binary")],
        *[Grid(4, "asymmetric", "group", 2), Grid(3, "asymmetric", "group", 16), Grid(8, "asymmetric", "tensor")],
    ],
    ids=str,
)
def test_a_quantized_weight_tied_to_both_is_stored_once(grid: Grid, size: int, activations: str) -> None:
    """A table and the output layer; twice, for several lookups and products may read it."""
    if grid.granularity == "group" and (activations == "dynamic" or size % (grid.group_size or 1)):
        pytest.skip("no such form")
    codes = quantize_weight(
        torch.from_numpy(np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)), grid
    )
    weight = parameter_value(codes).numpy()
    ids = numpy_helper.from_array(np.array([[0, 2, 4]]))
    nodes = [
        helper.make_node("Constant", [], ["ids"], value=ids),
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["product"]),
        helper.make_node("Gather", ["w", "ids"], ["rows"]),
        helper.make_node("Add", ["product", "rows"], ["sum"]),
        helper.make_node("MatMul", ["sum", "t"], ["y"]),
    ]
    made = put_weights(graph_of(nodes, [size, size], size), {"w": weight}, {"w": codes}, activations)
    integers = [t for t in made.initializer if t.data_type in (TensorProto.INT8, TensorProto.UINT8)]
    large = [t.name for t in integers if not t.name.startswith(("table.", "slots.")) and "zero_point" not in t.name]
    assert large == ["w.codes"]
    assert not [t.name for t in made.initializer if t.data_type == TensorProto.FLOAT and t.name == "w"]
    x = np.random.default_rng(1).normal(size=(3, size)).astype(np.float32)
    expected = (x @ weight.T + weight[[0, 2, 4]]) @ weight.T
    for node in [node for node in made.node if node.op_type == "MatMulNBits"]:
        node.CopyFrom(with_level(node, 0))
    tolerance = 1e-5 if activations == "none" else 0.03  # int8 inputs
    assert np.linalg.norm(answer(made, x) - expected) <= tolerance * np.linalg.norm(expected)


def test_a_quantized_weight_in_an_unknown_place_is_refused() -> None:
    codes = quantize_weight(torch.randn(4, 6), Grid(8))
    nodes = [helper.make_node("Relu", ["w"], ["y"])]
    with pytest.raises(ExportError, match="expected w read by a lookup or a linear, got Relu"):
        put_weights(graph_of(nodes, [4, 6]), {"w": np.zeros((4, 6), np.float32)}, {"w": codes}, "none")


def test_the_probe_of_the_int8_kernel_is_what_it_says() -> None:
    graph = onnx.load_from_string(base64.b64decode(engine.PROBE)).graph
    assert [node.op_type for node in graph.node] == ["MatMulInteger"]
    assert [value.type.tensor_type.elem_type for value in graph.input] == [TensorProto.UINT8, TensorProto.INT8]


@pytest.mark.parametrize("saturates", [False, True])
def test_a_cpu_that_saturates_gets_the_exact_kernel(monkeypatch: pytest.MonkeyPatch, saturates: bool) -> None:
    wrong = 16 * 255 * 127 - saturates

    class Session:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self, *_: Any) -> Any:
            return [np.full((4, 16), wrong)]

    engine.saturates.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", Session)
        options = engine.session_options(1)
    engine.saturates.cache_clear()
    if saturates:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError):  # never set
            options.get_session_config_entry("session.x64quantprecision")


@pytest.fixture(scope="module")
def folder(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact's folder as far as this engine looks at it."""
    path = tmp_path_factory.mktemp("artifact")
    bundle = bundle_of(tiny("distilbert", labels=LABELS))
    entry = engine.export(bundle, path)
    manifest = Manifest(
        flyweight="0",
        created="2026-11-01T00:00:00Z",
        task="text-classification",
        family="distilbert",
        inputs=bundle.family.inputs,
        pad_token_id=0,
        max_length=64,
        origin="",
        engines={"onnxruntime": entry},
    )
    write_manifest(path, manifest)
    return path


def test_open_runs_the_file_that_the_manifest_names(folder: Path) -> None:
    ids = np.array([[5, 6, 7]])
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    predictor = engine.open(folder, threads=2)
    assert predictor.run(arrays).shape == (1, 2)  # the model has no token_type_ids: they are ignored
    assert predictor.run(arrays).dtype == np.float32
    with pytest.raises(EngineError, match="none called attention_mask"):
        predictor.run({"input_ids": ids})
    with pytest.raises(EngineError, match="expected arrays that the model can take"):
        predictor.run(arrays | {"input_ids": ids + 10**6})
    predictor.close()
    predictor.close()
    with pytest.raises(EngineError, match="a closed one"):
        predictor.run(arrays)


def test_a_damaged_file_is_one_clear_line(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes((folder / onnx_export.FILE).read_bytes()[:5000])
    with pytest.raises(EngineError, match="expected an ONNX file that onnxruntime .* runs at .*model.onnx") as error:
        engine.open_file(path)
    assert "\n" not in str(error.value)


def test_no_file_for_this_engine(folder: Path, tmp_path: Path) -> None:
    from flyweight.artifact import read_manifest

    write_manifest(tmp_path, read_manifest(folder).model_copy(update={"engines": {}}))
    with pytest.raises(EngineError, match="expected an ONNX file in .*, got no engine's file"):
        engine.open(tmp_path)
