"""The simulated rounding of activations, bit for bit against onnxruntime's DynamicQuantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from flyweight.models.activations import dynamic_quantize, fake_quantize


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    outputs = [("y", TensorProto.UINT8, ["n"]), ("scale", TensorProto.FLOAT, []), ("zero", TensorProto.UINT8, [])]
    graph = helper.make_graph(
        [helper.make_node("DynamicQuantizeLinear", ["x"], [name for name, *_ in outputs])],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info(*output) for output in outputs],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def cases() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    found = [
        random.normal(shift, scale, size)
        for shift in (-5, 0, 0.3, 5)
        for scale in (1e-6, 0.1, 30)
        for size in (1, 7, 1000)
    ]
    found += [random.uniform(0, 1, 500), -random.uniform(0, 1, 500), np.zeros(9), np.full(3, 2.5), np.full(3, -2.5)]
    found += [np.arange(-128, 128) / 2.0, np.arange(0, 511) / 2.0]  # scale 1/2 and 1: halves must round to even
    return [case.astype(np.float32) for case in found]


def test_bit_exact(session: onnxruntime.InferenceSession) -> None:
    for case in cases():
        y, scale, zero = session.run(None, {"x": case})
        codes, own_scale, own_zero = dynamic_quantize(torch.from_numpy(case))
        assert own_scale.numpy().tobytes() == scale.tobytes()
        assert int(own_zero) == int(zero)
        assert (codes.numpy() == y).all()
        expected = (y.astype(np.float32) - np.float32(zero)) * scale
        assert (fake_quantize(torch.from_numpy(case)).numpy() == expected).all()
