"""Weight-only linears in ONNX: onnxruntime's MatMulNBits on our integers.

MatMulNBits (operator set com.microsoft) multiplies floats by integers that stay packed in memory: y = x @ W^T with

    W[n, k] = (slot[n, k] - zero[n, k // block]) * scale[n, k // block]

- B [N, blocks, block * bits / 8] uint8: slots of 4 or 8 bits, the first in the lowest bits; slot = integer + 2^(bits - 1).
- scales [N, blocks] float32. A scale that several blocks share is in the file once and is repeated at load.
- zero points uint8, packed as B is, for asymmetric grids alone: without any, 2^(bits - 1) holds. Float ones would work too, at a
  thirtieth of the speed.
- block: a power of two, 16 to 256. Rows that are no multiple of it are padded.

1 to 4 bits ride in slots of 4 with accuracy level 0, which is exact: the float product of what the codes mean. 1 and 2 bits are
in the file with 1 and 2 bits; they are spread to slots when it is loaded. 5 to 8 bits ride in slots of 8 with accuracy level 4:
the input becomes int8 with a scale for every row and block. Linears outside the blocks (heads), which have 8 bits always, are
multiplied as float32 where none within rounds its input: they take well below a percent of the time.

Why so: all-MiniLM-L6-v2 on a CPU with AVX512-VNNI, onnxruntime 1.31, one thread, runs interleaved. Speed is told against weights
that are unpacked to float32 at load, medians for 1 x 1, 1 x 32, 1 x 128 and 32 x 128 tokens (with 8 bits 8 x 128), on a busy
machine; dynamic int8: about 2.4, 1.9, 1.9, 1.8. Memory is what loading and one run of 1 x 128 added to the process.

    form                        speed                 memory      cosine to fp32
    4 bits, groups of 128
      float32 at load           1.0  1.0  1.0  1.0    238 MB      .92906
      slots of 4, level 0       1.8  .75  .9   1.2     41 MB      .92906
      slots of 4, level 4       6.5  1.0  .9   .86     43 MB      .92789
    2 bits, slots of 2, level 4 4.1  .86  .6   .78     38 MB
    8 bits per channel
      float32 at load           1.0  1.0  1.0  1.0                .99941
      slots of 8, level 0       .2   .3   .6   .8                 .99941
      level 4, blocks of 32     2.3  1.0  .7   .75     58 MB      .99915
      level 4, blocks of 256    2.4  1.1  .84  .89     55 MB      .99852

So none is faster than int8 at the lengths of an encoder; what they are for is size and memory. Decoders, which multiply one row
at a time, gain from level 4 with 4 bits and fewer.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from flyweight.engines.onnx_integer import Draft, Grid, every_byte, float_weight, grid, integers, pack, table_bytes
from flyweight.engines.onnx_qdq import smoothed, with_outliers
from flyweight.models.bundle import Codes

__all__ = ["DOMAIN", "Slots", "rounds_input", "rounds_inputs", "slots", "weights_only_linear", "with_level"]

DOMAIN = "com.microsoft"
BLOCKS = {4: (256, 128, 64, 32, 16), 8: (32, 16)}  # finer where the block is also that of the rounded input
LEVEL = {4: 0, 8: 4}


class Slots(NamedTuple):
    """How a weight lies in MatMulNBits: bits a slot, inputs a block, blocks a row (the last one may be padded)."""

    bits: int
    block: int
    blocks: int


def slots(codes: Codes, table: bool = False) -> Slots | str:
    """Where the integers fit, or the reason why they do not. table: they are shared with a table, whose rows have no padding."""
    info = codes.info
    bits, width = (4 if info.bits <= 4 else 8), info.shape[1]
    span = info.group_size if info.granularity == "group" and info.group_size else width
    block = next((block for block in BLOCKS[bits] if span % block == 0), None)
    if block is None and span < width:
        return f"groups of {span} are no multiple of 16"
    if block is None and table:
        return f"rows of {width} are no multiple of 16"
    if block is None:
        block = 32
    return Slots(bits, block, -(-width // block))


def weights_only_linear(draft: Draft, x: str, name: str, codes: Codes, output: str, whole: bool = False) -> str:
    """`x @ weight` (without the bias) from `x` [..., in], smoothing and outliers included.

    What does not fit (`slots`), or is asked for `whole`, is multiplied as float32, unpacked once when the file is loaded.
    """
    how = slots(codes, name in draft.tables)
    if whole or isinstance(how, str):
        return draft.add("MatMul", [x, _whole_float_weight(draft, name, codes)], output)
    inputs = [smoothed(draft, x, codes), *_stored(draft, name, codes, how)]
    out, width = codes.info.shape
    options = {"K": width, "N": out, "bits": how.bits, "block_size": how.block, "accuracy_level": LEVEL[how.bits]}
    product = output if codes.outliers is None else f"{output}.integers"
    draft.add("MatMulNBits", inputs, product, domain=DOMAIN, **options)
    return with_outliers(draft, x, name, codes, product, output)


def rounds_input(codes: Codes) -> bool:
    """Whether the MatMulNBits of a linear with these codes would round its input to int8."""
    how = slots(codes)
    return not isinstance(how, str) and LEVEL[how.bits] > 0


def rounds_inputs(graph: onnx.GraphProto) -> bool:
    """Whether some MatMulNBits of the graph rounds its input to int8."""
    return any(node.op_type == "MatMulNBits" and _level(node) > 0 for node in graph.node)


def with_level(node: onnx.NodeProto, level: int) -> onnx.NodeProto:
    """The same MatMulNBits with another accuracy level."""
    made = onnx.NodeProto()
    made.CopyFrom(node)
    for attribute in made.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = level
    return made


def _level(node: onnx.NodeProto) -> int:
    return sum(int(helper.get_attribute_value(one)) for one in node.attribute if one.name == "accuracy_level")


def _whole_float_weight(draft: Draft, name: str, codes: Codes) -> str:
    """The float32 weight [in, out] with smoothing undone and outliers put in; all of it is folded at load."""
    current = float_weight(draft, name, codes)
    if codes.smooth is not None:
        smooth, plain = draft.constant(f"{name}.smooth", codes.smooth.cpu().numpy()[:, None]), current
        current = f"{plain}.plain"
        if not draft.has(current):
            draft.add("Div", [plain, smooth], current)
    if codes.outliers is not None and codes.outlier_values is not None:
        places = draft.constant(f"{name}.outliers", codes.outliers.cpu().numpy()[:, None])
        values = draft.constant(f"{name}.outlier_values", np.ascontiguousarray(codes.outlier_values.cpu().numpy().T))
        rest, current = current, f"{current}.whole"
        if not draft.has(current):
            draft.add("ScatterND", [rest, places, values], current)
    return current


def _stored(draft: Draft, name: str, codes: Codes, how: Slots) -> list[str]:
    """Names of B, scales and, for asymmetric grids, zero points."""
    _, zero = integers(codes)
    parts = [_slots(draft, name, codes, how), _scales(draft, name, codes.scale.cpu().numpy(), len(codes.codes), how)]
    if zero is None:
        return parts
    points = np.zeros((len(codes.codes), how.blocks), np.int16)
    points += np.repeat(zero, how.blocks // zero.shape[-1], axis=-1)
    return [*parts, draft.constant(f"{name}.blocks.zero_point", pack(points, _layout(how)))]


def _slots(draft: Draft, name: str, codes: Codes, how: Slots) -> str:
    """Name of B; made at load where the file has it with fewer bits, or as a table has it."""
    values, layout, shared = integers(codes)[0], grid(codes), name in draft.tables
    own = _layout(how)
    if not shared and layout.size >= 4:
        packed = pack(_padded(values, how), own).reshape(len(values), how.blocks, -1)
        return draft.constant(f"{name}.codes", packed)
    output = f"{name}.slots"
    if draft.has(output):
        return output
    if shared:
        current = table_bytes(draft, name, values, codes)
    else:
        current = draft.constant(f"{name}.codes", pack(_padded(values, how), layout))
    if layout.size == 8:  # int8 -> the same number + 128 as uint8
        wide = draft.add("Cast", [current], f"{output}.wide", to=TensorProto.INT32)
        moved = draft.add("Add", [wide, draft.constant("int32.128", np.array(128, np.int32))], f"{output}.moved")
        current = draft.add("Cast", [moved], f"{output}.uint8", to=TensorProto.UINT8)
    elif layout != own:
        index = draft.add("Cast", [current], f"{output}.index", to=TensorProto.INT32)
        table = draft.constant(f"slots.{layout.size}.{layout.low}.{layout.step}", pack(every_byte(layout), own))
        current = draft.add("Gather", [table, index], f"{output}.spread")
    return draft.add("Reshape", [current, draft.shape(len(values), how.blocks, -1)], output)


def _layout(how: Slots) -> Grid:
    """How integers lie in slots."""
    return Grid(how.bits, -(1 << (how.bits - 1)), 1)


def _padded(values: NDArray[np.int8], how: Slots) -> NDArray[np.int8]:
    """Rows of whole blocks. What stands in the padding is multiplied by nothing; -1 is in every grid."""
    missing = how.blocks * how.block - values.shape[1]
    return np.pad(values, ((0, 0), (0, missing)), constant_values=-1)


def _scales(draft: Draft, name: str, scale: NDArray[np.float32], out: int, how: Slots) -> str:
    """[1], [out, 1] or [out, groups] -> [out, blocks]; what is repeated is repeated at load."""
    kind = f"{name}.{'linear.' if name in draft.tables else ''}scale"
    if scale.shape == (out, how.blocks):
        return draft.constant(kind, scale)
    output = f"{kind}.blocks"
    if draft.has(output):
        return output
    if scale.ndim == 1 or scale.shape[1] == 1:
        return draft.add("Expand", [draft.constant(kind, scale), draft.shape(out, how.blocks)], output)
    groups = scale.shape[1]
    stored = draft.constant(kind, scale[..., None])
    spread = draft.add("Expand", [stored, draft.shape(out, groups, how.blocks // groups)], f"{output}.spread")
    return draft.add("Reshape", [spread, draft.shape(out, how.blocks)], output)
