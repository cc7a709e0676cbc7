"""Linears whose inputs are rounded to a fixed grid, or to one for every token: the QDQ form.

    x -> Mul(1 / smooth) -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- int8 [in, out]

onnxruntime makes one MatMulIntegerToFloat of the last three, OpenVINO its own int8 product. A scale for every token is not
something these operators know; dividing a token by its scale before a grid of step 1, and multiplying what comes out, is the
same.

Outlier channels, whose integers are zero, are gathered, multiplied in float and added. Linears that read one tensor with the
same smoothing and the same grid (q, k and v) share all of it.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from flyweight.engines.onnx_integer import Draft, linear_integers
from flyweight.errors import ExportError
from flyweight.models.bundle import Codes

__all__ = ["rounded_linear", "smoothed", "with_outliers"]

SMALLEST = float(np.finfo(np.float32).tiny)


def rounded_linear(draft: Draft, x: str, name: str, codes: Codes, activations: str, output: str) -> str:
    """`x @ weight` (without the bias) from `x` [..., in] with activations "static" or "token". Raises ExportError for groups."""
    if codes.info.granularity == "group":
        raise ExportError(
            f"a scale per tensor or channel for {name}", "groups", "quantize groups with activations: none"
        )
    inner, size = smoothed(draft, x, codes), ""
    if activations == "token":
        values, size = _by_token(draft, inner)
    else:
        assert codes.input_scale is not None
        assert codes.input_zero_point is not None
        scale, zero = codes.input_scale.cpu().numpy(), codes.input_zero_point.cpu().numpy()
        values = _on_grid(draft, inner, np.float32(scale.item()), np.uint8(zero.item()))
    product = output if codes.outliers is None and not size else f"{output}.integers"
    draft.add("MatMul", [values, _weight(draft, name, codes)], product)
    if size:
        current = output if codes.outliers is None else f"{output}.scaled"
        product = draft.add("Mul", [product, size], current)
    return with_outliers(draft, x, name, codes, product, output)


def smoothed(draft: Draft, x: str, codes: Codes) -> str:
    """x / smooth; one for all linears that read the same input with the same numbers."""
    if codes.smooth is None:
        return x
    factor = (1 / codes.smooth).cpu().numpy().astype(np.float32)
    key = _key(factor)
    output = f"{x}.smoothed.{key}"
    return output if draft.has(output) else draft.add("Mul", [x, draft.constant(f"smooth.{key}", factor)], output)


def with_outliers(draft: Draft, x: str, name: str, codes: Codes, product: str, output: str) -> str:
    """`product` + the outlier channels of x times their float weights; `product` itself where there are none."""
    if codes.outliers is None or codes.outlier_values is None:
        return product
    places = codes.outliers.cpu().numpy()
    key = _key(places)
    chosen = f"{x}.outliers.{key}"
    if not draft.has(chosen):
        draft.add("Gather", [x, draft.constant(f"outliers.{key}", places)], chosen, axis=-1)
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
