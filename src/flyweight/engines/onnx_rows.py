"""Values [..., width] as matrices [rows, width], from one integer Gemm to the next.

Gemm knows matrices only. Between two of them most is done token by token, which is the same on the matrix: norms, activation
functions, sums of two such values. These are written for the matrix, so that nothing stands between a product and what
engines fuse with it; a value takes its own shape again where somebody needs that.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import AttributeProto, NodeProto, helper, numpy_helper

from flyweight.engines.onnx_integer import Draft, Rows
from flyweight.engines.onnx_names import FLAT

__all__ = ["put_rows", "reshaped", "rows_of", "sizes", "token_by_token", "whole"]

ALONE = {"Erf", "Exp", "Identity", "Neg", "Reciprocal", "Relu", "Sigmoid", "Softplus", "Sqrt", "Tanh"}
PAIRS = {"Add", "Div", "Mul", "Pow", "Sub"}
LAST: dict[str, dict[str, object]] = {"LayerNormalization": {"axis": -1}, "ReduceMean": {"axes": [-1], "keepdims": 1}}
"""Operators on the last axis alone, given that their attributes are these."""


def rows_of(draft: Draft, x: str, width: int) -> Rows:
    """x as a matrix [rows, width]."""
    if x not in draft.rows:
        draft.rows[x] = Rows(draft.add("Flatten", [x], f"{x}{FLAT}", axis=-1), x, width)
    return draft.rows[x]


def put_rows(draft: Draft, output: str, matrix: str, source: str, width: int) -> None:
    """From now on `output` is there as a matrix. source: a value of its shape but for the last axis"""
    draft.rows[output] = Rows(matrix, source, width)
    draft.pending.add(output)


def whole(draft: Draft, name: str) -> str:
    """The value in its own shape."""
    if name in draft.pending:
        draft.pending.remove(name)
        draft.add("Reshape", [draft.rows[name].matrix, sizes(draft, name)], name)
    return name


def sizes(draft: Draft, name: str) -> str:
    """The shape of a value that is there as a matrix, int64."""
    rows = draft.rows[name]
    lead = f"lead.{_lead(draft, rows)}"
    if not draft.has(lead):
        draft.add("Shape", [whole(draft, rows.source)], lead, end=-1)
    found = f"{lead}.{rows.width}"
    return found if draft.has(found) else draft.add("Concat", [lead, draft.shape(rows.width)], found, axis=0)


def token_by_token(draft: Draft, node: NodeProto, inputs: Sequence[str]) -> bool:
    """Write the node for matrices, where it works on single tokens and its inputs are there as matrices, or constants."""
    given = _kept(node.attribute)
    known = node.op_type in ALONE | PAIRS or (node.op_type in LAST and LAST[node.op_type].items() <= given.items())
    if not known or len(node.output) > 1 or not any(name in draft.pending for name in inputs):
        return False
    rows = [draft.rows[name] for name in inputs if name in draft.rows]
    rest = [draft.initializers.get(name) for name in inputs if name not in draft.rows]
    if any(one is None or len(one.dims) > 1 for one in rest) or len({_lead(draft, one) for one in rows}) > 1:
        return False
    width = max([one.width for one in rows] + [one.dims[0] for one in rest if one is not None and one.dims])
    if node.op_type == "ReduceMean":
        width = 1
    output = node.output[0]
    matrices = [draft.rows[name].matrix if name in draft.rows else name for name in inputs]
    draft.add(node.op_type, matrices, f"{output}.rows", **given)
    put_rows(draft, output, f"{output}.rows", rows[0].source, width)
    return True


def reshaped(draft: Draft, node: NodeProto, inputs: Sequence[str]) -> bool:
    """Write a Reshape of a value that is there as a matrix: what it makes is the same."""
    if node.op_type != "Reshape" or inputs[0] not in draft.pending:
        return False
    shape = draft.initializers.get(inputs[1])
    if shape is not None and not numpy_helper.to_array(shape).all():  # 0: as in the value's own shape
        return False
    draft.add("Reshape", [draft.rows[inputs[0]].matrix, inputs[1]], node.output[0], **_kept(node.attribute))
    return True


def _lead(draft: Draft, rows: Rows) -> str:
    return draft.leads.get(rows.source, rows.source)


def _kept(attributes: Sequence[AttributeProto]) -> dict[str, object]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in attributes}
