"""The simulated rounding of activations, bit for bit against onnxruntime's DynamicQuantizeLinear."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from flyweight.artifact import QuantizedTensor
from flyweight.models.activations import dynamic_quantize, fake_quantize
from flyweight.models.bundle import Codes
from flyweight.models.codes import integer_bias


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


def test_an_integer_bias_by_hand() -> None:
    """Steps of .5 x .25 and .5 x 1: 0.3 is 2.4 of the first, with the shift's 0.5 it is 6.4; a row of zeros takes fine ones."""
    info = QuantizedTensor(shape=(3, 2), bits=8, scheme="symmetric", granularity="channel", static=True, shifted=True)
    codes = Codes(
        info=info,
        codes=torch.tensor([[128 + 4, 128], [128, 128 - 2], [128, 128]], dtype=torch.uint8),
        scale=torch.tensor([[0.25], [1.0], [1.0]]),
        zero_point=None,
        input_scale=torch.tensor([0.5]),
        input_zero_point=torch.tensor([128], dtype=torch.uint8),
        input_shift=torch.tensor([0.5, 0.0]),
    )
    held = integer_bias(codes, torch.tensor([0.3, 0.6, 0.1]))
    assert held is not None
    assert held.integers.tolist() == [6, 1, round(0.1 * 2**16)]
    assert held.steps.tolist() == [0.125, 0.5, 2**-16]
    assert held.scale.flatten().tolist() == [0.25, 1.0, 2**-15]
    assert held.error.tolist() == pytest.approx([6 * 0.125 - 0.8, -0.1, round(0.1 * 2**16) / 2**16 - 0.1], abs=1e-7)
    assert (
        integer_bias(codes, torch.tensor([0.3, 1e9, 0.1])) is None
    )  # more steps than an integer holds beside a product
    assert integer_bias(replace(codes, info=info.model_copy(update={"bits": 6})), torch.zeros(3)) is None
    assert integer_bias(replace(codes, input_scale=None), torch.zeros(3)) is None
