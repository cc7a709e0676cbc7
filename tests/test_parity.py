"""The parity check lets right files through and stops wrong ones; its figure is the one defined at the top of the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from engine_cases import LABELS, arrays_of, bundle_of, quantize
from flyweight import parity
from flyweight.engines import onnxruntime as engine
from flyweight.errors import ExportError
from flyweight.golden import TEXTS
from flyweight.methods.quantize.grid import Grid
from flyweight.models.bundle import Bundle

Tiny = Callable[..., Path]


def test_relative_errors_by_hand() -> None:
    wanted = np.array([[3.0, 4.0], [0.0, 0.1], [6.0, 8.0]], np.float32)  # norms 5, 0.1, 10: the median is 5
    found = wanted + np.array([[0.3, 0.4], [0.0, 0.5], [0.0, -1.0]], np.float32)
    np.testing.assert_allclose(parity.relative_errors(found, wanted), [0.1, 0.1, 0.1], rtol=1e-5)
    deep = wanted.reshape(3, 2, 1)
    np.testing.assert_allclose(parity.relative_errors(found.reshape(3, 2, 1), deep), [0.1, 0.1, 0.1], rtol=1e-5)
    with pytest.raises(ExportError, match=r"expected answers of shape \(3, 2\), got \(3, 1\)"):
        parity.relative_errors(found[:, :1], wanted)


def damage(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:  # type: ignore[type-arg]
    model = onnx.load(str(path))
    (tensor,) = [one for one in model.graph.initializer if one.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, str(path))


def one_larger(array: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    array.flat[3] *= 1.5
    return array


LINEAR = "model.bert.encoder.layer.2.intermediate.dense"
TABLE = "model.bert.embeddings.position_embeddings.weight"
DAMAGES: list[tuple[str, Callable[[Bundle], object], str]] = [
    ("fp32", lambda bundle: None, f"{LINEAR}.weight"),
    ("fp32 bias", lambda bundle: None, f"{LINEAR}.bias"),
    ("int8", lambda bundle: quantize(bundle, Grid(8), "dynamic"), f"{LINEAR}.weight.scale"),
    ("int8 zero", lambda bundle: quantize(bundle, Grid(8, "asymmetric"), "dynamic"), f"{LINEAR}.weight.zero_point"),
    ("int8 table", lambda bundle: quantize(bundle, Grid(8), "dynamic"), f"{TABLE}.scale"),
    ("4 bits", lambda bundle: quantize(bundle, Grid(4), "none"), f"{LINEAR}.weight.scale"),
    ("1 bit", lambda bundle: quantize(bundle, Grid(1, "binary"), "dynamic"), f"{LINEAR}.weight.scale"),
]


@pytest.mark.parametrize(("what", "treat", "name"), DAMAGES, ids=[what for what, _, _ in DAMAGES])
def test_one_wrong_number_fails_the_export(
    tiny: Tiny, tmp_path: Path, what: str, treat: Callable[[Bundle], object], name: str
) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    treat(bundle)
    entry = engine.export(bundle, tmp_path)
    arrays = arrays_of(bundle)
    assert parity.check(bundle, tmp_path, entry, arrays) >= 0
    damage(tmp_path / entry.file, name, one_larger)
    with pytest.raises(ExportError, match=r"against torch of at most 5\.0e-04, got \d\.\de-\d\d") as error:
        parity.check(bundle, tmp_path, entry, arrays)
    assert "\n" not in str(error.value)


def test_wrong_rounding_of_activations_fails_the_export(tiny: Tiny, tmp_path: Path) -> None:
    """The float twin cannot see this one: the integers are right, what they are multiplied with is not."""
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(8), "dynamic")
    entry = engine.export(bundle, tmp_path)
    model = onnx.load(str(tmp_path / entry.file))
    for node in model.graph.node:
        if node.op_type == "MatMulInteger" and "layer.1/attention/output" in node.output[0]:
            zero = numpy_helper.from_array(np.array(0, np.uint8), "no.zero")
            node.input[2] = "no.zero"
    model.graph.initializer.append(zero)
    onnx.save(model, str(tmp_path / entry.file))
    with pytest.raises(ExportError, match="expected median error of onnx/model.onnx against torch"):
        parity.check(bundle, tmp_path, entry, arrays_of(bundle))


def test_nan_is_no_agreement(tiny: Tiny, tmp_path: Path) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    entry = engine.export(bundle, tmp_path)
    damage(tmp_path / entry.file, "model.classifier.bias", lambda array: array * np.nan)
    with pytest.raises(ExportError, match="got nan"):
        parity.check(bundle, tmp_path, entry, arrays_of(bundle))


def test_nothing_to_compare_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    with pytest.raises(ExportError, match="expected at least one batch"):
        parity.check(bundle, tmp_path, engine.export(bundle, tmp_path), [])


@pytest.mark.parametrize("treat", ["fp32", "int8", "int8-asymmetric", "4 bits", "1 bit"])
def test_minilm(minilm: Path, tmp_path: Path, treat: str) -> None:
    """Real weights have outlier channels, where rounding flips matter most."""
    bundle = bundle_of(minilm, "embedding")
    if treat == "4 bits":
        quantize(bundle, Grid(4, "asymmetric", "group", 64), "none", Grid(4))
    elif treat != "fp32":
        grids = {"int8": Grid(8), "int8-asymmetric": Grid(8, "asymmetric"), "1 bit": Grid(1, "binary")}
        quantize(bundle, grids[treat], "dynamic")
    entry = engine.export(bundle, tmp_path)
    error = parity.check(bundle, tmp_path, entry, arrays_of(bundle, TEXTS))
    assert error < (1e-5 if entry.precision != "int8-dynamic" else 0.3)
    if treat == "int8":
        assert (tmp_path / entry.file).stat().st_size <= 23.1e6  # 22.7 million parameters
        damage(tmp_path / entry.file, "model.encoder.layer.3.output.dense.weight.scale", one_larger)
        with pytest.raises(ExportError, match="without integer arithmetic against torch"):
            parity.check(bundle, tmp_path, entry, arrays_of(bundle, TEXTS[:4]))


def test_the_check_leaves_the_bundle_alone(tiny: Tiny, tmp_path: Path) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(8), "dynamic")
    before, threads = replace(bundle), torch.get_num_threads()
    entry = engine.export(bundle, tmp_path)
    parity.check(bundle, tmp_path, entry, arrays_of(bundle))
    assert bundle == before
    assert torch.get_num_threads() == threads
