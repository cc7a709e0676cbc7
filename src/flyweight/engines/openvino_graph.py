"""What our ONNX files are turned into when OpenVINO loads them: the same values, in the shape that it fuses best.

The files are written for both engines. onnxruntime runs them node by node; OpenVINO draws activation functions and rounding into
the product before them, unless somebody else reads what lies between.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyweight.engines.onnx_names import FLAT, LOOKUP, OUTLIERS, UNPACKED

__all__ = ["PART", "prepared"]

PART = ".part"
"""At the end of the names of products that are computed once more for a few of their outputs."""
ELEMENTWISE = {"Add", "Convert", "Divide", "Erf", "Exp", "Multiply", "Power", "Relu", "Sigmoid", "Subtract", "Tanh"}


def prepared(model: Any) -> Any:
    """The `openvino.Model` of one of our files, changed in place."""
    _unflatten(model)
    _split_outliers(model)
    _unpack_tables(model)
    model.validate_nodes_and_infer_types()
    return model


def _unflatten(model: Any) -> None:
    """Take out the flattening for onnxruntime's integer Gemm, which OpenVINO does not need.

    On matrices it makes smoothing, shift and rounding one operator that takes six times as long as if they were fused with
    what comes before; onnxruntime instead has no other kernel with a bias.
    """
    for node in _named(model, "Reshape"):
        if node.get_friendly_name().endswith(FLAT):
            node.output(0).replace(node.input_value(0))
    model.validate_nodes_and_infer_types()


def _split_outliers(model: Any) -> None:
    """Compute the first channels that a product keeps in float beside its integers once more, from the product before on.

    Where nobody reads what the rounding reads, activation function and rounding of all channels become a part of that
    product's kernel, which writes integers then.
    """
    for node in _named(model, "Slice"):
        source = node.input_value(0)
        if OUTLIERS not in node.get_friendly_name():
            continue
        start, stop = (_constant(node.input_value(place)) for place in (1, 2))
        if start is None or stop is None or start.item() != 0:
            continue
        width = _length(source)
        part = None if width is None else _Part(width, stop.item()).of(source)
        if part is not None:
            node.output(0).replace(part)


class _Part:
    """Values [..., width] computed anew for their first `count` channels, back to the product that they come from."""

    def __init__(self, width: int, count: int) -> None:
        self.width, self.count = width, count
        self.made: dict[tuple[str, int], Any] = {}

    def of(self, value: Any) -> Any | None:
        """The output [..., count]; None where something in between is not done number by number."""
        key = (value.get_node().get_name(), value.get_index())
        if key not in self.made:
            self.made[key] = self._new(value)
        return self.made[key]

    def _new(self, value: Any) -> Any | None:
        from openvino import opset13 as op

        node, shape = value.get_node(), value.get_partial_shape()
        kind = node.get_type_name()
        if _length(value) != self.width:
            return value if kind == "Constant" or shape.is_static else None
        if kind == "Constant":
            return op.constant(np.ascontiguousarray(node.data[..., : self.count])).output(0)
        if kind == "MatMul":
            weight = self.of(node.input_value(1))
            settings = node.get_attributes()
            if weight is None or settings["transpose_b"]:
                return None
            made = op.matmul(node.input_value(0), weight, settings["transpose_a"], False)
        elif kind == "Reshape" and shape.is_static:
            given = self.of(node.input_value(0))
            if given is None or _length(node.input_value(0)) != self.width:
                return None
            made = op.reshape(given, np.array([*list(shape.to_shape())[:-1], self.count]), False)
        elif kind in ELEMENTWISE:
            inputs = [self.of(one) for one in node.input_values()]
            if any(one is None for one in inputs):
                return None
            rest = [value.get_element_type().to_string()] if kind == "Convert" else []
            made = getattr(op, kind.lower())(*inputs, *rest)
        else:
            return None
        made.set_friendly_name(f"{node.get_friendly_name()}{PART}")
        return made.output(0)


def _unpack_tables(model: Any) -> None:
    """Tables of 4, 6 and 7 bits a number as int8, instead of unpacking the rows that are looked up (`onnx_integer`)."""
    from openvino import opset13 as op

    lookups = {node.get_friendly_name(): node for node in _named(model, "Gather")}
    for node in _named(model, "Concat"):
        name = node.get_friendly_name()
        lookup = lookups.get(name.removesuffix(UNPACKED) + LOOKUP) if name.endswith(UNPACKED) else None
        packed = None if lookup is None else _constant(lookup.input_value(0))
        width = _length(node.output(0))
        if lookup is None or packed is None or width is None:
            continue
        table = op.constant(unpacked(packed, width))
        rows = op.gather(table, lookup.input_value(1), lookup.input_value(2))
        node.output(0).replace(op.convert(rows, "f32").output(0))


def unpacked(packed: NDArray[np.uint8], width: int) -> NDArray[np.int8]:
    """[rows, width * bits / 8] bytes, lower bits a value each and the rest of the row above them -> [rows, width]."""
    size = packed.shape[1]
    bits = 8 * size // width
    over, tail = 8 - bits, width - size
    upper = (packed >> bits).reshape(len(packed), -1, tail) << (over * np.arange(bits // over, dtype=np.uint8))[:, None]
    values = np.concatenate([packed & ((1 << bits) - 1), np.bitwise_or.reduce(upper, 1)], 1)
    return np.asarray(values.astype(np.int16) - (1 << (bits - 1)), np.int8)


def _named(model: Any, kind: str) -> Iterator[Any]:
    """Nodes of one type; the model may be changed meanwhile."""
    return (node for node in model.get_ordered_ops() if node.get_type_name() == kind)


def _constant(value: Any) -> NDArray[Any] | None:
    node = value.get_node()
    found: NDArray[Any] | None = node.data if node.get_type_name() == "Constant" else None
    return found


def _length(value: Any) -> int | None:
    """Of the last axis."""
    shape = value.get_partial_shape()
    last = shape[len(shape) - 1] if shape.rank.is_static and len(shape) else None
    return last.get_length() if last is not None and last.is_static else None
