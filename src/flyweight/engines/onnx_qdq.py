"""Linears whose inputs are rounded to a fixed grid, or to one for every token: the QDQ form.

    x [rows, in] -> Mul(1 / smooth) -> Add(-shift / smooth) -> QuantizeLinear -> DequantizeLinear -> Gemm
                                                 int8 [in, out] -> DequantizeLinear -> Gemm
                                                      int32 bias -> DequantizeLinear -> Gemm

onnxruntime makes one QGemm of all that (of a MatMul without a bias one MatMulIntegerToFloat), OpenVINO its own int8 product. As
a sum of its own the bias would cost 3 of 25 ms (all-MiniLM-L6-v2, 1 x 128): Gelu with a bias is half as fast as without. A
scale for every token is not something these operators know; dividing a token by its scale before a grid of step 1, and
multiplying what comes out, is the same.

Outlier channels, whose integers are zero, are picked by a slice where they are the first ones, else by a product with ones
(onnxruntime's Gather takes ten times as long on the last axis), multiplied in float and added. Linears that read one tensor
with the same smoothing and the same grid (q, k and v) share all of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from flyweight.engines.onnx_integer import Draft, linear_integers
from flyweight.engines.onnx_names import OUTLIERS
from flyweight.engines.onnx_rows import put_rows, rows_of, whole
from flyweight.errors import ExportError
from flyweight.models.bundle import Codes
from flyweight.models.codes import IntegerBias, integer_bias

__all__ = ["rounded_linear", "smoothed", "with_outliers"]

SMALLEST = float(np.finfo(np.float32).tiny)


Bias = tuple[str, NDArray[np.float32]]
"""Its name and its values [out]."""


def rounded_linear(
    draft: Draft, x: str, name: str, codes: Codes, activations: str, output: str, bias: Bias | None = None
) -> str:
    """`x @ weight + bias` from `x` [..., in] with activations "static" or "token". Raises ExportError for groups."""
    if codes.info.granularity == "group":
        raise ExportError(
            f"a scale per tensor or channel for {name}", "groups", "quantize groups with activations: none"
        )
    if activations == "static":
        held = integer_bias(codes, None if bias is None else torch.from_numpy(bias[1]))
        if held is not None:
            kept = replace(codes, scale=held.scale)
            return _biased(draft, x, name, kept, f"{name}.of_shift" if bias is None else bias[0], held, output)
        if codes.of_shift is not None:
            moved = codes.of_shift.cpu().numpy()
            bias = (f"{name}.of_shift", moved) if bias is None else (f"{bias[0]}.shifted", bias[1] + moved)
    x = whole(draft, x)
    inner, result = _moved(draft, x, codes), output if bias is None else f"{output}.product"
    product = result if codes.outliers is None else f"{output}.integers"
    if activations == "token":
        values, size = _by_token(draft, inner)
        draft.add("MatMul", [values, _weight(draft, name, codes)], f"{output}.steps")
        draft.add("Mul", [f"{output}.steps", size], product)
    else:
        draft.add("MatMul", [_on_grid(draft, inner, *_grid(codes)), _weight(draft, name, codes)], product)
    with_outliers(draft, x, name, codes, product, result)
    return output if bias is None else draft.add("Add", [result, draft.constant(*bias)], output)


def _biased(draft: Draft, x: str, name: str, codes: Codes, bias: str, held: IntegerBias, output: str) -> str:
    """Product and bias in one integer Gemm, which knows matrices only. bias: its name"""
    scale, zero = _grid(codes)
    stored = draft.constant(f"{bias}.int32", held.integers.cpu().numpy())
    steps = draft.constant(f"{bias}.scale", held.steps.cpu().numpy())
    added = draft.add("DequantizeLinear", [stored, steps], f"{output}.bias", axis=0)
    out, width = codes.info.shape
    result = f"{output}.rows"
    product = result if codes.outliers is None else f"{output}.integers"
    values = _on_grid(draft, _moved_rows(draft, x, codes), scale, zero)
    draft.add("Gemm", [values, _weight(draft, name, codes), added], product)
    if codes.outliers is not None:
        with_outliers(draft, rows_of(draft, x, width).matrix, name, codes, product, result)
    put_rows(draft, output, result, draft.rows[x].source if x in draft.rows else x, out)
    return output


def _moved_rows(draft: Draft, x: str, codes: Codes) -> str:
    """`_moved` as a matrix, though before that where a Reshape made x: OpenVINO 2026.4 rounds wrongly otherwise."""
    width = codes.info.shape[1]
    if any(x in node.output and node.op_type == "Reshape" for node in draft.nodes):
        return rows_of(draft, _moved(draft, x, codes), width).matrix
    return _moved(draft, rows_of(draft, x, width).matrix, codes)


def _moved(draft: Draft, x: str, codes: Codes) -> str:
    """(x - shift) / smooth"""
    inner = smoothed(draft, x, codes)
    return inner if codes.input_shift is None else _shifted(draft, inner, codes)


def _grid(codes: Codes) -> tuple[np.float32, np.uint8]:
    """Scale and zero-point of a static grid."""
    assert codes.input_scale is not None
    assert codes.input_zero_point is not None
    return np.float32(codes.input_scale.item()), np.uint8(codes.input_zero_point.item())


def smoothed(draft: Draft, x: str, codes: Codes) -> str:
    """x / smooth; one for all linears that read the same input with the same numbers."""
    if codes.smooth is None:
        return x
    factor = (1 / codes.smooth).cpu().numpy().astype(np.float32)
    key = _key(factor)
    output = f"{x}.smoothed.{key}"
    return output if draft.has(output) else draft.add("Mul", [x, draft.constant(f"smooth.{key}", factor)], output)


def _shifted(draft: Draft, smoothed_x: str, codes: Codes) -> str:
    """x / smooth - shift / smooth, from x / smooth."""
    assert codes.input_shift is not None
    shift = codes.input_shift if codes.smooth is None else codes.input_shift / codes.smooth
    values = (-shift).cpu().numpy().astype(np.float32)
    key = _key(values)
    output = f"{smoothed_x}.shifted.{key}"
    if draft.has(output):
        return output
    return draft.add("Add", [smoothed_x, draft.constant(f"shift.{key}", values)], output)


def with_outliers(draft: Draft, x: str, name: str, codes: Codes, product: str, output: str) -> str:
    """`product` + the outlier channels of x times their float weights; `product` itself where there are none."""
    if codes.outliers is None or codes.outlier_values is None:
        return product
    places = codes.outliers.cpu().numpy()
    key = _key(places)
    chosen = f"{x}{OUTLIERS}{key}"
    if not draft.has(chosen) and places.tolist() == list(range(len(places))):
        draft.add("Slice", [x, draft.shape(0), draft.shape(len(places)), draft.shape(-1)], chosen)
    elif not draft.has(chosen):
        stored = draft.constant(f"outliers.{key}", places.astype(np.int64))
        width = draft.constant(f"width.{codes.info.shape[1]}", np.array(codes.info.shape[1], np.int64))
        one_hot = f"outliers.{key}.one_hot"  # made at load
        if not draft.has(one_hot):
            draft.add(
                "OneHot", [stored, width, draft.constant("off.on", np.array([0, 1], np.float32))], one_hot, axis=0
            )
        draft.add("MatMul", [x, one_hot], chosen)
    values = draft.constant(f"{name}.outlier_values", np.ascontiguousarray(codes.outlier_values.cpu().numpy().T))
    return draft.add("Add", [product, draft.add("MatMul", [chosen, values], f"{output}.rest")], output)


def _on_grid(draft: Draft, x: str, scale: np.float32, zero: np.uint8) -> str:
    """x rounded to a uint8 grid and back."""
    output = f"{x}.rounded.{_key(np.array([scale, zero]))}"
    if draft.has(output):
        return output
    grid = [draft.constant(f"{output}.scale", np.array(scale)), draft.constant(f"{output}.zero_point", np.array(zero))]
    codes = draft.add("QuantizeLinear", [x, *grid], f"{output}.uint8")
    return draft.add("DequantizeLinear", [codes, *grid], output)


def _by_token(draft: Draft, x: str) -> tuple[str, str]:
    """(x / size rounded to whole numbers, size [..., 1]): size = max|x| / 127 over a token, as `activations.round_tokens`."""
    output, size = f"{x}.by_token", f"{x}.by_token.size"
    if not draft.has(size):
        largest = draft.add("ReduceMax", [draft.add("Abs", [x], f"{size}.abs")], f"{size}.max", axes=[-1], keepdims=1)
        small = draft.add("Div", [largest, draft.constant("float.127", np.array(127, np.float32))], f"{size}.any")
        draft.add("Max", [small, draft.constant("float.tiny", np.array(SMALLEST, np.float32))], size)
        draft.add("Div", [x, size], output)
    return _on_grid(draft, output, np.float32(1), np.uint8(128)), size


def _weight(draft: Draft, name: str, codes: Codes) -> str:
    """Name of the weight [in, out], integers with a DequantizeLinear behind them."""
    output = f"{name}.dequantized"
    if draft.has(output):
        return output
    integers, zero, scale = linear_integers(draft, name, codes)
    if zero is None:
        shape = () if codes.info.granularity == "tensor" else (codes.info.shape[0],)
        zero = draft.constant(f"zeros.{'x'.join(map(str, shape))}", np.zeros(shape, np.int8))
    return draft.add("DequantizeLinear", [integers, scale, zero], output, axis=1)


def _key(array: NDArray[np.generic]) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:12]
