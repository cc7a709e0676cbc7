"""How a figure is called, written and compared."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from flyweight.artifact import Measurement

__all__ = ["change", "higher_is_better", "interval", "label", "model_name", "number", "ordered", "show"]

LABELS = {
    "parameters": "parameters",
    "nonzero_parameters": "non-zero parameters",
    "flops": "FLOPs an item",
    "bytes": "size on disk",
    "artifact_bytes": "whole folder",
    "peak_memory_bytes": "peak memory",
    "latency_ms": "latency",
    "throughput_per_s": "throughput",
    "energy_j_per_item": "energy an item",
    "co2e_g_per_item": "CO2e an item",
    "cost_per_million": "cost of a million items",
    "speedup": "times faster than",
}
MODELS = {
    "result": "result",
    "reference_torch": "torch fp32",
    "reference_onnxruntime": "onnxruntime fp32",
    "reference_openvino": "openvino fp32",
    "result_openvino": "result in openvino",
}
ORDER = (
    "quality", "bytes", "artifact_bytes", "parameters", "nonzero_parameters", "flops", "peak_memory_bytes",
    "latency_ms", "throughput_per_s", "speedup", "energy_j_per_item", "co2e_g_per_item", "cost_per_million",
)  # fmt: skip
DECIMAL = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def model_name(name: str) -> str:
    """How the manifest's candidates are called (the two references run in fp32); others keep their name."""
    return MODELS.get(name, name)


def label(key: str) -> str:
    """`latency_ms.p50@1x128` -> `latency p50 1x128` (batch x tokens)."""
    stem, _, point = key.partition("@")
    head, _, part = stem.partition(".")
    where = ""
    if re.fullmatch(r"\d+x\d+", point):
        where = f" {point}"
    if head == "quality":
        return part.replace("_", " ").replace(".difference", ", difference to the reference")
    if head == "bytes" and part:
        return f"weights of {part}"
    name = LABELS.get(head, head.replace("_", " "))
    return f"{name} {model_name(part) if head == 'speedup' else part}".rstrip() + where


def ordered(keys: Iterable[str]) -> list[str]:
    """Quality first, then size, memory, time, energy, money; by batch and length within."""

    def place(key: str) -> tuple[int, bool, list[int], str]:
        stem, _, point = key.partition("@")
        head, _, part = stem.partition(".")
        known = ORDER.index(head) if head in ORDER else len(ORDER)
        return known, head == "bytes" and bool(part), [int(n) for n in re.findall(r"\d+", point)], stem

    return sorted(dict.fromkeys(keys), key=place)


def higher_is_better(key: str) -> bool:
    return key.startswith(("quality", "throughput", "speedup"))


def scale(value: float, unit: str) -> tuple[float, str]:
    """(factor, suffix) that turn a value of this size into something short: bytes into MB, a share into percent."""
    size = abs(value)
    if unit == "share":
        return 100.0, " %"
    if unit in ("B", "weights", "FLOP"):
        step, prefix = next(((s, p) for s, p in DECIMAL if size >= s), DECIMAL[-1])
        return 1 / step, f" {prefix}{'' if unit == 'weights' else unit}".rstrip()
    if unit in ("J", "g"):
        step, prefix = next(((s, p) for s, p in SMALL if size >= s), SMALL[-1] if size else SMALL[0])
        return 1 / step, f" {prefix}{unit}"
    if unit == "ms":
        return (1e-3, " s") if size >= 1000 else (1.0, " ms")
    if unit == "x":
        return 1.0, "x"
    return 1.0, "" if unit == "price" else f" {unit}"


def digits(value: float) -> str:
    """Three significant digits without an exponent, more where the whole part has more."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(places, 6)}f}"


def number(value: float, unit: str, signed: bool = False) -> str:
    """`23.1 MB`, `83.9 %`, `4.20 ms`; signed shares are differences and told in points."""
    if unit == "share":
        return f"{100 * value:+.1f} points" if signed else f"{100 * value:.1f} %"
    if unit == "cosine":
        return f"{value:{'+' if signed else ''}.5f}"
    factor, suffix = scale(value, unit)
    if unit in ("B", "weights") and factor == 1.0:
        return f"{value:,.0f}{suffix}"
    return digits(value * factor) + suffix


def show(key: str, figure: Measurement) -> str:
    """The value alone."""
    return number(figure.value, figure.unit, key.endswith(".difference"))


def interval(key: str, figure: Measurement) -> str:
    """`4.10 to 4.32`, in the scale of the value; one side where the sample bounds only one; empty without any."""
    factor, _ = scale(figure.value, figure.unit)

    def side(value: float) -> str:
        if figure.unit == "share":
            return f"{100 * value:+.1f}" if key.endswith(".difference") else f"{100 * value:.1f}"
        if figure.unit == "cosine":
            return number(value, figure.unit, key.endswith(".difference"))
        return digits(value * factor)

    if figure.low is not None and figure.high is not None:
        return f"{side(figure.low)} to {side(figure.high)}"
    if figure.low is not None:
        return f"from {side(figure.low)}"
    return "" if figure.high is None else f"up to {side(figure.high)}"


def change(key: str, result: Measurement, reference: Measurement) -> str:
    """`4.1x less`, `5.2x more`, `same`; for quality the difference in points."""
    if key.startswith("quality"):
        return number(result.value - reference.value, result.unit, signed=True)
    if not (result.value > 0 and reference.value > 0):
        return ""
    ratio = result.value / reference.value
    if abs(ratio - 1) < 0.005:
        return "same"
    return f"{digits(ratio)}x more" if ratio > 1 else f"{digits(1 / ratio)}x less"
