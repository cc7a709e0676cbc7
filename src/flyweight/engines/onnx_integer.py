"""Quantized weights inside an ONNX graph: integers in the file, integer kernels at run time.

What onnxruntime makes of the forms written here (seen in its optimized graph, version 1.31):

- dynamic activations: DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul -> Add becomes one MatMulIntegerToFloat (or
  DynamicQuantizeMatMul). The quantized input is shared by all linears that read it (q, k and v).
- weights only: Cast -> Sub -> Mul over constants is folded to float once, when the file is loaded. DequantizeLinear
  would not be: onnxruntime keeps it and runs it again for every input.
- fewer than 8 bits in linears: bytes -> Gather from a table of 256 rows, one for each byte, with the 8/k integers packed in it.
  This is folded at load as well, so that 1-bit weights run in the same int8 kernel.
- fewer than 8 bits in embeddings: only the rows looked up are unpacked, with 4, 6 and 7 bits by arithmetic, else by the same
  Gather, which takes five times as long (the integer shifts and Floor of onnxruntime are no faster).

Linears hold their integers as [in, out], as MatMul reads them; embeddings as [rows, width]. In linears 3 bits ride in slots of
4, and 5 to 7 in slots of 8; tables take the bits that they say: 3 and 5 lie in planes of 4, 2 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from flyweight.engines.onnx_names import LOOKUP, UNPACKED, UPPER
from flyweight.errors import ExportError
from flyweight.models.bundle import Codes

__all__ = [
    "OPSET",
    "Draft",
    "Grid",
    "Rows",
    "every_byte",
    "float_weight",
    "grid",
    "integers",
    "linear_integers",
    "pack",
    "quantized_embedding",
    "quantized_linear",
    "table_bytes",
]


OPSET = 17  # the first with LayerNormalization; onnxruntime 1.13 and later read it


class Rows(NamedTuple):
    """A value [..., width] as a matrix [rows, width]. source: a value of the same shape but for the last axis"""

    matrix: str
    source: str
    width: int


@dataclass
class Draft:
    """A graph being written, in execution order. `inputs` of `add` are names; "" leaves an optional one out.

    tables: quantized weights that lookups read; a linear tied to one takes its integers from there
    rows:   values that are there as matrices (`engines.onnx_rows`); pending: of these, the ones that are nothing else
    leads:  {name of a value: a name for all of its axes but the last}, the same for values that have these in common
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: dict[str, onnx.TensorProto] = field(default_factory=dict)
    outputs: set[str] = field(default_factory=set)
    quantized_inputs: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    tables: set[str] = field(default_factory=set)
    rows: dict[str, Rows] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    leads: dict[str, str] = field(default_factory=dict)

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        self.outputs.add(output)
        return output

    def has(self, output: str) -> bool:
        return output in self.outputs

    def shape(self, *sizes: int) -> str:
        """A constant list of int64: a shape, or the ends of a slice."""
        return self.constant("sizes." + "x".join(map(str, sizes)), np.array(sizes, np.int64))

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """An initializer; a second one of the same name is the same one."""
        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def quantize_input(self, name: str) -> tuple[str, str, str]:
        """(uint8 values, scale, zero point) of an activation; one DynamicQuantizeLinear for all who read it."""
        if name not in self.quantized_inputs:
            outputs = (f"{name}.uint8", f"{name}.scale", f"{name}.zero_point")
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [name], list(outputs), name=outputs[0]))
            self.quantized_inputs[name] = outputs
        return self.quantized_inputs[name]


def number(draft: Draft, value: float) -> str:
    """A float32 scalar."""
    return draft.constant(f"float.{value}", np.array(value, np.float32))


class Grid(NamedTuple):
    """How integers lie in the file: `size` bits each, integer = low + step * stored."""

    size: int
    low: int
    step: int

    @property
    def per_byte(self) -> int:
        return 8 // self.size


WITH_TAIL = (4, 6, 7)
"""Bits of tables whose last values lie above the first ones."""


def grid(codes: Codes) -> Grid:
    """Sizes are 1, 2, 4 or 8. Binary weights that were pruned as well are -1, 0 and +1, which take 2 bits."""
    if codes.info.scheme == "binary":
        return Grid(1, -1, 2) if codes.mask is None else Grid(2, -1, 1)
    return Grid(next(size for size in (1, 2, 4, 8) if size >= codes.info.bits), -(2 ** (codes.info.bits - 1)), 1)


def integers(codes: Codes) -> tuple[NDArray[np.int8], NDArray[np.int8] | None]:
    """Signed integers [out, in] and zero points (shape of the scale) with weight = (integer - zero point) * scale."""
    low, step = (-1, 2) if codes.info.scheme == "binary" else (-(2 ** (codes.info.bits - 1)), 1)
    values = low + step * codes.codes.cpu().numpy().astype(np.int16)
    zero = None if codes.zero_point is None else (codes.zero_point.cpu().numpy().astype(np.int16) + low).astype(np.int8)
    if codes.mask is not None:
        size = codes.info.group_size if codes.info.granularity == "group" else 1
        nothing = np.int8(0) if zero is None else np.repeat(zero, size or 1, axis=-1)
        values = np.where(codes.mask.cpu().numpy().astype(bool), values, nothing)
    return values.astype(np.int8), zero


def quantized_linear(draft: Draft, x: str, name: str, codes: Codes, output: str) -> str:
    """`x @ weight` (without the bias) from `x` [..., in], which is rounded to the grid that its own range gives."""
    if codes.info.granularity == "group":
        raise ExportError(
            f"a scale per tensor or channel for {name}", "groups", "quantize groups with activations: none"
        )
    weight, zero, scale = linear_integers(draft, name, codes)
    values, x_scale, x_zero = draft.quantize_input(x)
    inputs = [values, weight, x_zero, *([zero] if zero else [])]
    sums = draft.add("MatMulInteger", inputs, f"{output}.int32")
    both = draft.add("Mul", [x_scale, scale], f"{output}.scale")
    return draft.add("Mul", [draft.add("Cast", [sums], f"{output}.float", to=TensorProto.FLOAT), both], output)


def linear_integers(draft: Draft, name: str, codes: Codes) -> tuple[str, str | None, str]:
    """Names of int8 [in, out], zero points [out] or scalar, scales [out] or scalar; written once for a shared weight."""
    values, zero = integers(codes)
    flat = () if codes.info.granularity == "tensor" else (-1,)
    scale = _part(draft, name, "scale", codes.scale.cpu().numpy().reshape(flat))
    zero_name = None if zero is None else _part(draft, name, "zero_point", zero.reshape(flat))
    return _unpacked_matrix(draft, name, values.T, codes), zero_name, scale


def _part(draft: Draft, name: str, kind: str, array: NDArray[Any]) -> str:
    """Scales or zero points as a linear reads them; a table of the same name has them in its own shape."""
    return draft.constant(f"{name}.{'linear.' if name in draft.tables else ''}{kind}", array)


def _unpacked_matrix(draft: Draft, name: str, values: NDArray[np.int8], codes: Codes) -> str:
    """Name of `values` [in, out] as int8, packed in the file where the grid takes less than 8 bits."""
    if name in draft.tables:
        return _turned_table(draft, name, values.T, codes)
    how = grid(codes)
    if how.size == 8:
        return draft.constant(f"{name}.codes", values)
    output = f"{name}.int8"
    if draft.has(output):
        return output
    packed = draft.constant(f"{name}.codes", pack(values.reshape(1, -1), how)[0])
    spread = _spread(draft, packed, how, output)  # [bytes, per byte]
    flat = draft.add("Reshape", [spread, draft.shape(-1)], f"{output}.flat")
    if values.size % how.per_byte:
        flat = _cut(draft, flat, values.size, 0, f"{output}.cut")
    return draft.add("Reshape", [flat, draft.shape(*values.shape)], output)


def table_bytes(draft: Draft, name: str, values: NDArray[np.int8], codes: Codes) -> str:
    """Name of a table's integers [rows, width] as they lie in the file: int8, or packed bytes, every row by itself."""
    how = grid(codes)
    return draft.constant(f"{name}.codes", values if how.size == 8 else pack(values, how))


def _turned_table(draft: Draft, name: str, values: NDArray[np.int8], codes: Codes) -> str:
    """Name of a table's integers as int8 [width, rows], for the linear tied to it; unpacked and turned at load."""
    output, how, current = f"{name}.turned", grid(codes), table_bytes(draft, name, values, codes)
    if draft.has(output):
        return output
    rows, width = values.shape
    if how.size < 8:
        spread = _spread(draft, current, how, f"{output}.int8")
        current = draft.add("Reshape", [spread, draft.shape(rows, -1)], f"{output}.joined")
        if width % how.per_byte:
            current = _cut(draft, current, width, 1, f"{output}.cut")
    return draft.add("Transpose", [current], output, perm=[1, 0])


def float_weight(draft: Draft, name: str, codes: Codes) -> str:
    """Name of the float32 weight [in, out]; everything before it is constant and is folded when the file is loaded."""
    output = f"{name}.float32"
    if draft.has(output):
        return output
    values, zero = integers(codes)
    inner, out = values.T.shape
    groups = _groups(codes)
    layout = () if codes.info.granularity == "tensor" else (groups, 1, out) if groups > 1 else (1, out)
    current = _unpacked_matrix(draft, name, values.T, codes)
    if groups > 1:
        current = draft.add("Reshape", [current, draft.shape(groups, inner // groups, out)], f"{output}.groups")
    current = draft.add("Cast", [current], f"{output}.cast", to=TensorProto.FLOAT)
    if zero is not None:
        stored = _part(draft, name, "zero_point", zero.T.reshape(layout))
        point = draft.add("Cast", [stored], f"{output}.zero", to=TensorProto.FLOAT)
        current = draft.add("Sub", [current, point], f"{output}.centred")
    scale = _part(draft, name, "scale", codes.scale.cpu().numpy().T.reshape(layout))
    if groups == 1:
        return draft.add("Mul", [current, scale], output)
    current = draft.add("Mul", [current, scale], f"{output}.scaled")
    return draft.add("Reshape", [current, draft.shape(inner, out)], output)


def _groups(codes: Codes) -> int:
    return int(codes.scale.shape[-1]) if codes.info.granularity == "group" else 1


def planes(codes: Codes) -> list[Grid]:
    """A table of 3 or 5 bits as tables of 4, 2 and 1 bits whose sum it is; any other one as it is."""
    bits = codes.info.bits
    if codes.info.scheme == "binary" or bits in (1, 2, 4, 8):
        return [grid(codes)]
    found: list[Grid] = []
    shift = 0
    for size in (4, 2, 1):
        if bits & size:
            found.append(Grid(size, 0 if found else -(1 << (bits - 1)), 1 << shift))
            shift += size
    return found


def _summed_rows(
    draft: Draft, ids: str, name: str, values: NDArray[np.int8], layers: Sequence[Grid], output: str
) -> str:
    """float32 [batch, length, width], summed over the planes of the rows looked up; Add knows no int8."""
    left, current = values.astype(np.int16) - layers[0].low, ""
    for place, plane in enumerate(layers):
        part = (plane.low + plane.step * (left // plane.step % (1 << plane.size))).astype(np.int8)
        stored = draft.constant(f"{name}.codes.{place}", pack(part, plane))
        rows = _rows(draft, stored, ids, values.shape[1], plane, f"{output}.plane{place}")
        current = draft.add("Add", [current, rows], f"{output}.sum{place}") if current else rows
    return current


def _rows(draft: Draft, stored: str, ids: str, width: int, how: Grid, output: str) -> str:
    """Integers as float32 [batch, length, width] of a table's rows as they lie in the file."""
    current = draft.add("Gather", [stored, ids], f"{output}{LOOKUP}")
    if how.size < 8:
        spread = _spread(draft, current, how, output)  # [batch, length, bytes, per byte]
        current = draft.add("Reshape", [spread, draft.shape(0, 0, -1)], f"{output}.joined")
        current = _cut(draft, current, width, 2, f"{output}.cut") if width % how.per_byte else current
    return draft.add("Cast", [current], f"{output}.float", to=TensorProto.FLOAT)


def _pack_with_tail(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """[rows, n] of 4, 6 or 7 bits -> [rows, ceil(n / 8) * bits] bytes.

    The first values of a row lie in the lower bits of a byte each; what is left over above them holds the rest: first the lowest
    bits of all of them, then the next.
    """
    over = 8 - bits
    padded = np.pad(stored, ((0, 0), (0, -stored.shape[1] % 8)))
    size = padded.shape[1] * bits // 8
    digits = padded[:, None, size:] >> (over * np.arange(bits // over, dtype=np.uint8))[:, None] & ((1 << over) - 1)
    return np.asarray(padded[:, :size] | digits.reshape(len(stored), size) << bits, np.uint8)


def _rows_with_tail(draft: Draft, ids: str, name: str, values: NDArray[np.int8], bits: int, output: str) -> str:
    """Integers as float32 [batch, length, width] of a table that `_pack_with_tail` has packed, -2^(bits-1) being the lowest.

    Rounding (byte - (2^bits - 1) / 2) / 2^bits gives the upper bits, since nothing lies half-way; what they stand for is
    taken off the byte, and makes the rest of the row.
    """
    half, width = 1 << (bits - 1), values.shape[1]
    stored = draft.constant(f"{name}.codes", _pack_with_tail((values.astype(np.int16) + half).astype(np.uint8), bits))
    rows = draft.add("Gather", [stored, ids], f"{output}{LOOKUP}")
    top, none = number(draft, 2 * half), draft.constant("uint8.0", np.array(0, np.uint8))
    centre = draft.constant(f"uint8.{half}", np.array(half, np.uint8))
    moved = draft.add("DequantizeLinear", [rows, number(draft, 1), centre], f"{output}.moved")  # byte - half
    between = draft.add("Add", [moved, number(draft, 0.5)], f"{output}.between")
    upper = draft.add("QuantizeLinear", [between, top, none], f"{output}{UPPER}")
    carried = draft.add("DequantizeLinear", [upper, top, none], f"{output}.carried")
    first = draft.add("Sub", [moved, carried], f"{output}.first")
    digits, tail = bits // (8 - bits), -(-width // 8) * (8 - bits)
    weights = 2.0 ** ((8 - bits) * np.arange(digits) - bits)[:, None]
    powers = draft.constant(f"powers.{bits}", weights.astype(np.float32))
    groups = draft.add("Reshape", [carried, draft.shape(0, 0, digits, tail)], f"{output}.groups")
    parts = draft.add("Mul", [groups, powers], f"{output}.parts")
    rest = draft.add("ReduceSum", [parts, draft.shape(2)], f"{output}.rest", keepdims=0)
    rest = draft.add("Sub", [rest, number(draft, half)], f"{output}.tail")
    current = draft.add("Concat", [first, rest], f"{output}{UNPACKED}", axis=-1)
    return _cut(draft, current, width, 2, f"{output}.cut") if width % 8 else current


def quantized_embedding(draft: Draft, ids: str, name: str, codes: Codes, output: str, tied: bool = False) -> str:
    """Rows of a table at `ids` [batch, length] as float32 [batch, length, width]; only these rows are dequantized.

    tied: a linear reads the same table, whose integers then lie in slots of 1, 2, 4 or 8 bits
    """
    values, zero = integers(codes)
    width = values.shape[1]
    if tied or codes.info.bits == 8:
        stored = table_bytes(draft, name, values, codes)
        current = _rows(draft, stored, ids, width, grid(codes), f"{output}.int8")
    elif codes.info.bits in WITH_TAIL:
        current = _rows_with_tail(draft, ids, name, values, codes.info.bits, f"{output}.int8")
    else:
        current = _summed_rows(draft, ids, name, values, planes(codes), output)
    groups = _groups(codes)
    if groups > 1:
        current = draft.add("Reshape", [current, draft.shape(0, 0, groups, width // groups)], f"{output}.groups")

    def of_rows(array: NDArray[Any], kind: str) -> str:
        """[rows, groups] -> [batch, length, groups (, 1)]; a single number stays one."""
        if array.size == 1:
            return draft.constant(f"{name}.{kind}", array.reshape(()))
        stored = draft.constant(f"{name}.{kind}", array[..., None] if groups > 1 else array)
        return draft.add("Gather", [stored, ids], f"{output}.{kind}")

    if zero is not None:
        point = draft.add("Cast", [of_rows(zero, "zero_point")], f"{output}.zero", to=TensorProto.FLOAT)
        current = draft.add("Sub", [current, point], f"{output}.centred")
    scale = of_rows(codes.scale.cpu().numpy(), "scale")
    if groups == 1:
        return draft.add("Mul", [current, scale], output)
    current = draft.add("Mul", [current, scale], f"{output}.scaled")
    return draft.add("Reshape", [current, draft.shape(0, 0, width)], output)


def pack(values: NDArray[np.integer], how: Grid) -> NDArray[np.uint8]:
    """Integers [rows, n] -> [rows, ceil(n * size / 8)] bytes, the first value in the lowest bits."""
    stored = ((values.astype(np.int16) - how.low) // how.step).astype(np.uint8)
    padded = np.pad(stored, ((0, 0), (0, -values.shape[1] % how.per_byte)))
    parts = padded.reshape(len(values), -1, how.per_byte) << (how.size * np.arange(how.per_byte, dtype=np.uint8))
    packed: NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=-1)
    return packed


def _spread(draft: Draft, packed: str, how: Grid, output: str) -> str:
    """uint8 [...] -> int8 [..., per byte] by looking every byte up in a table."""
    table = draft.constant(f"table.{how.size}.{how.low}.{how.step}", every_byte(how))
    index = draft.add("Cast", [packed], f"{output}.index", to=TensorProto.INT32)
    return draft.add("Gather", [table, index], f"{output}.spread")


def every_byte(how: Grid) -> NDArray[np.int8]:
    """[256, per byte]: the integers that each byte holds."""
    stored = (np.arange(256)[:, None] >> (how.size * np.arange(how.per_byte))) & (2**how.size - 1)
    return np.asarray(how.low + how.step * stored, np.int8)


def _cut(draft: Draft, x: str, length: int, axis: int, output: str) -> str:
    """Drop the padding of the last byte."""
    return draft.add("Slice", [x, draft.shape(0), draft.shape(length), draft.shape(axis)], output)
