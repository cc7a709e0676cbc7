"""The same ONNX file with its integer arithmetic undone: what parity can hold to a tight tolerance.

Rounding of activations is chaotic: a difference in the last bit of a sum can move a value over a rounding edge, and a few
such flips change an answer as much as the rounding itself does. Errors in weights, scales or wiring hide behind that,
but not in the twin.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from flyweight.engines.onnx_names import UPPER
from flyweight.engines.onnx_nbits import with_level

__all__ = ["write_float_twin"]


def write_float_twin(source: Path, target: Path) -> None:
    """Every DynamicQuantizeLinear passes its input on with scale 1, every QuantizeLinear of activations and what undoes it as it
    is; every MatMulInteger multiplies floats."""
    model = onnx.load(str(source))
    nodes: list[onnx.NodeProto] = []
    floats: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "DynamicQuantizeLinear":
            values, scale, _ = node.output
            one = numpy_helper.from_array(np.array(1, np.float32))
            nodes.append(helper.make_node("Identity", [node.input[0]], [values]))
            nodes.append(helper.make_node("Constant", [], [scale], value=one))
        elif node.op_type == "QuantizeLinear" and not node.output[0].endswith(UPPER):
            nodes.append(helper.make_node("Identity", [node.input[0]], [node.output[0]]))
            floats.add(node.output[0])
        elif node.op_type == "DequantizeLinear" and node.input[0] in floats:
            nodes.append(helper.make_node("Identity", [node.input[0]], [node.output[0]]))
        elif node.op_type == "DequantizeLinear":  # left alone, onnxruntime makes a MatMulNBits of it and the product
            nodes += _float_weight(node)
        elif node.op_type == "MatMulInteger":
            nodes += _float_product(node)
        elif node.op_type == "MatMulNBits":
            nodes.append(with_level(node, 0))
        else:
            nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > 2**30
    onnx.save_model(model, str(target), save_as_external_data=large)


def _float_weight(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """(integer - zero point) * scale, of a weight [in, out] or a bias [out] by [out]."""
    output = node.output[0]
    made = [helper.make_node("Cast", [node.input[0]], [f"{output}.whole"], to=TensorProto.FLOAT)]
    centred = f"{output}.whole"
    if len(node.input) > 2:
        made.append(helper.make_node("Cast", [node.input[2]], [f"{output}.zero"], to=TensorProto.FLOAT))
        made.append(helper.make_node("Sub", [centred, f"{output}.zero"], [f"{output}.centred"]))
        centred = f"{output}.centred"
    return [*made, helper.make_node("Mul", [centred, node.input[1]], [output])]


def _float_product(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x @ (weight - zero point) with the integers as floats; the scales come after it as before."""
    output = node.output[0]
    x, weight, zero = node.input[0], node.input[1], node.input[3] if len(node.input) > 3 else ""
    made = [helper.make_node("Cast", [weight], [f"{output}.weight"], to=TensorProto.FLOAT)]
    centred = f"{output}.weight"
    if zero:
        made.append(helper.make_node("Cast", [zero], [f"{output}.zero"], to=TensorProto.FLOAT))
        made.append(helper.make_node("Sub", [centred, f"{output}.zero"], [f"{output}.centred"]))
        centred = f"{output}.centred"
    return [*made, helper.make_node("MatMul", [x, centred], [output])]
