"""OpenVINO on our ONNX files: the same answers, in the precision that the file says, and not a word to anybody."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import tiny as families
from engine_cases import LABELS, arrays_of, bundle_of, quantize, torch_answers
from flyweight import extras
from flyweight.artifact import Engine, Manifest, QuantizedTensor, read_manifest, write_manifest
from flyweight.engines import onnxruntime, openvino
from flyweight.errors import EngineError, MissingExtra
from flyweight.methods.quantize.grid import Grid
from flyweight.parity import relative_errors

Tiny = Callable[..., Path]
pytestmark = pytest.mark.skipif(openvino.available() is not None, reason=f"{openvino.available()}")

CASES: dict[str, Any] = {
    "fp32": None,
    "int8-dynamic": (Grid(8), "dynamic"),
    "weights-only-8": (Grid(8), "none"),
    "weights-only-4-groups": (Grid(4, "asymmetric", "group", 8), "none", Grid(4)),
    "binary": (Grid(1, "binary"), "dynamic", Grid(2, "asymmetric")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", families.ENCODERS)
def test_it_answers_as_the_model(tiny: Tiny, tmp_path: Path, family: str, case: str) -> None:
    """Rounded to bf16, or with inputs rounded to int8 in groups, fp32 and weights-only would be off by a percent and more."""
    bundle = bundle_of(tiny(family, labels=LABELS))
    if CASES[case]:
        quantize(bundle, *CASES[case])
    path = tmp_path / onnxruntime.export(bundle, tmp_path).file
    arrays = arrays_of(bundle)
    found = openvino.open_file(path)
    answers = np.concatenate([found.run(batch) for batch in arrays])
    if bundle.activations == "dynamic":  # a last bit may move an input over a rounding edge
        other = onnxruntime.open_file(path)
        assert np.median(relative_errors(answers, np.concatenate([other.run(batch) for batch in arrays]))) < 0.01
    else:  # onnxruntime may compute packed weights in int8, OpenVINO does not
        direct = np.concatenate([torch_answers(bundle, batch) for batch in arrays])
        assert relative_errors(answers, direct).max() < 5e-5


def test_its_settings_are_those_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    model = openvino.compiled(tmp_path / onnxruntime.export(bundle, tmp_path).file, threads=2)
    told = {name: str(model.get_property(name)) for name in ("INFERENCE_PRECISION_HINT", "PERFORMANCE_HINT")}
    assert told == {"INFERENCE_PRECISION_HINT": "<Type: 'float32'>", "PERFORMANCE_HINT": "LATENCY"}
    assert model.get_property("INFERENCE_NUM_THREADS") == 2
    assert model.get_property("NUM_STREAMS") == 1
    assert model.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_an_answer_is_not_overwritten_by_the_next(tiny: Tiny, tmp_path: Path) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    predictor = openvino.open_file(tmp_path / onnxruntime.export(bundle, tmp_path).file)
    first, *_, last = arrays_of(bundle)
    before = predictor.run(first)
    kept = before.copy()
    predictor.run(last)
    np.testing.assert_array_equal(before, kept)
    np.testing.assert_array_equal(predictor.run(first), kept)


def test_nothing_is_reported_and_nothing_written(tiny: Tiny, tmp_path: Path) -> None:
    """In a fresh process with a home of its own and without the variables that silence the telemetry of test machines."""
    bundle = bundle_of(tiny("bert", labels=LABELS))
    path = tmp_path / "model" / onnxruntime.export(bundle, tmp_path / "model").file
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import socket, sys
def refuse(*_): raise AssertionError("a connection")
socket.socket.connect = refuse
import numpy as np
from pathlib import Path
from flyweight.engines import openvino
ids = np.array([[5, 6, 7]])
arrays = dict(input_ids=ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))
print(openvino.open_file(Path({str(path)!r})).run(arrays).shape)
print([name for name in sys.modules if name.startswith("openvino_telemetry")])
"""
    silent = {"CI", "TF_BUILD", "JENKINS_URL"}
    environment = {key: value for key, value in os.environ.items() if key not in silent}
    environment |= {"HOME": str(home), "USERPROFILE": str(home)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=home)
    assert done.stdout.splitlines() == ["(1, 2)", "[]"], done.stderr
    assert list(home.iterdir()) == []


def artifact_of(bundle: Any, folder: Path, *names: str) -> Path:
    entry = onnxruntime.export(bundle, folder)
    manifest = Manifest(
        flyweight="0", created="2026-11-01T00:00:00Z", task="text-classification", family="bert",
        inputs=bundle.family.inputs, pad_token_id=0, max_length=64, origin="", engines=dict.fromkeys(names, entry),
    )  # fmt: skip
    write_manifest(folder, manifest)
    return folder


@pytest.mark.parametrize("names", [("onnxruntime",), ("openvino",), ("onnxruntime", "openvino")])
def test_open_takes_its_own_entry_or_the_shared_file(tiny: Tiny, tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = artifact_of(bundle_of(tiny("bert", labels=LABELS)), tmp_path, *names)
    ids = np.array([[5, 6, 7]])
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    predictor = openvino.open(folder, threads=2)
    assert predictor.run(arrays).shape == (1, 2)
    assert predictor.run(arrays).dtype == np.float32
    with pytest.raises(EngineError, match="none called attention_mask"):
        predictor.run({"input_ids": ids})
    with pytest.raises(EngineError, match="expected arrays that the model can take"):
        predictor.run(arrays | {"attention_mask": np.ones((1, 4), np.int64)})
    predictor.close()
    predictor.close()
    with pytest.raises(EngineError, match="a closed one"):
        predictor.run(arrays)


def test_no_file_for_it(tiny: Tiny, tmp_path: Path) -> None:
    folder = artifact_of(bundle_of(tiny("bert", labels=LABELS)), tmp_path)
    with pytest.raises(EngineError, match="expected an ONNX file in .*, got no engine's file; use engine torch"):
        openvino.open(folder)
    engines = {"openvino": Engine(file="onnx/gone.onnx", inputs=(), outputs=(), precision="fp32", parity=0.0)}
    manifest = Manifest(
        flyweight="0", created="", task="text-classification", family="bert", inputs=(), pad_token_id=0, max_length=64,
        origin="", engines=engines,
    )  # fmt: skip
    write_manifest(folder, manifest)
    with pytest.raises(EngineError, match="expected an ONNX file at .*gone.onnx, got no such file"):
        openvino.open(folder)


def test_what_it_lacks_is_said_with_the_engine_that_has_it(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    node = helper.make_node("BiasDropoutOfNobody", ["x"], ["y"], domain="com.microsoft")
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT, [1])], [value("y", TensorProto.FLOAT, [1])])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    )
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError) as error:
        openvino.open_file(tmp_path / "model.onnx")
    line = str(error.value)
    assert "BiasDropoutOfNobody" in line
    assert "use engine onnxruntime" in line
    assert "\n" not in line


LINE = "expected linears of at least 3 bits where inputs stay in float, as OpenVINO unpacks no fewer"


def test_weights_that_the_graph_unpacks_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(1, "binary"), "none")
    path = tmp_path / onnxruntime.export(bundle, tmp_path).file
    onnxruntime.open_file(path).close()
    with pytest.raises(EngineError, match=f"{LINE}, got 1 or 2; use engine onnxruntime or torch"):
        openvino.open_file(path)


def test_a_damaged_file_is_one_clear_line(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / onnxruntime.export(bundle_of(tiny("bert", labels=LABELS)), tmp_path).file
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        EngineError, match="expected an ONNX file that OpenVINO .* runs at .*model.onnx, got '.+'"
    ) as error:
        openvino.open_file(path)
    assert "\n" not in str(error.value)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extras, "have", lambda module: False)
    monkeypatch.setattr(openvino, "have", lambda module: False)
    for name in [name for name in sys.modules if name == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    assert openvino.available() == 'openvino is not installed; run: pip install "flyweight[openvino]"'
    with pytest.raises(MissingExtra, match=r"pip install \"flyweight\[openvino\]\""):
        openvino.open_file(tmp_path / "model.onnx")


def static_file(path: Path, top: int) -> None:
    """128 inputs of 255 times 128 weights of `top`: on a kernel that adds pairs in 16 bits the largest sums there are."""
    stored: dict[str, Any] = {
        "one": np.float32(1), "zero": np.uint8(0), "weight": np.full((128, 128), top, np.int8),
        "scale": np.ones(128, np.float32), "none": np.zeros(128, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["x.uint8"]),
        helper.make_node("DequantizeLinear", ["x.uint8", "one", "zero"], ["x.rounded"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "none"], ["weight.float32"], axis=1),
        helper.make_node("MatMul", ["x.rounded", "weight.float32"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, ["n", 8, 128])], [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())


OLD_CPU = """
import sys
from pathlib import Path
import numpy as np
from flyweight.engines import openvino
x = {"x": np.full((1, 8, 128), 255, np.float32)}
print(openvino.saturates(), *(int(openvino.open_file(Path(f)).run(x).flat[0]) for f in sys.argv[1:]))
"""


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from flyweight.engines import openvino
first, second = (openvino.open_file(Path(sys.argv[1])) for _ in range(2))
for opened in (first, second):
    opened.close()
del first, second, opened
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_two_models_were_closed_is_no_crash(tmp_path: Path) -> None:
    """Closed in the order of opening: with a Core each, the stack that Python takes signals on would be gone."""
    static_file(tmp_path / "m.onnx", 1)
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, str(tmp_path / "m.onnx")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x64 has kernels that saturate")
@pytest.mark.parametrize("saturates", [False, True])
def test_seven_bits_are_exact_where_eight_saturate(tmp_path: Path, saturates: bool) -> None:
    """Its kernels for CPUs without VNNI, in a process that is told to take these; the other way this CPU's own."""
    weights = (127, 63, -64)
    for top in weights:
        static_file(tmp_path / f"{top}.onnx", top)
    environment = {**os.environ, **({"ONEDNN_MAX_CPU_ISA": "AVX2"} if saturates else {})}
    command = [sys.executable, "-c", OLD_CPU, *(str(tmp_path / f"{top}.onnx") for top in weights)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    told, *found = done.stdout.split()
    exact = [128 * 255 * top for top in weights]
    if not saturates and told == "True":
        pytest.skip("this CPU has no VNNI")
    assert told == str(saturates)
    assert [int(number) for number in found[1:]] == exact[1:]
    assert (int(found[0]) == exact[0]) is not saturates


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_that_would_saturate_are_refused(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    folder = artifact_of(bundle_of(tiny("bert", labels=LABELS)), tmp_path, "onnxruntime")
    manifest = read_manifest(folder)
    static = QuantizedTensor(shape=(2, 2), bits=bits, scheme="symmetric", granularity="channel", static=True)
    table = static.model_copy(update={"bits": 8, "static": False})
    engines = {"onnxruntime": manifest.engines["onnxruntime"].model_copy(update={"precision": "int8-static"})}
    write_manifest(folder, manifest.model_copy(update={"quantized": {"a": static, "t": table}, "engines": engines}))
    monkeypatch.setattr(openvino, "saturates", lambda: False)
    openvino.open(folder).close()
    monkeypatch.setattr(openvino, "saturates", lambda: True)
    if bits == 7:
        openvino.open(folder).close()
    else:
        with pytest.raises(
            EngineError, match="at most 7 bits, .* got 8 bits; use engine onnxruntime, .*reduce-range on"
        ):
            openvino.open(folder)
