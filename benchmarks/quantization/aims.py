"""What was aimed at, and whether it was reached: `met`, `not met`, or a dash where a row that it needs gave nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.aims import Line, at_least, at_most
from benchmarks.models import MINILM, MPNET, Model
from benchmarks.quantization.classes import row_name
from benchmarks.quantization.found import Found
from benchmarks.quantization.variants import CLASSES, TRAINED
from benchmarks.table import DASH, interval
from benchmarks.tuned import SEEDS
from flyweight.artifact import Measurement

POINTS = {"int8-static": 0.5, "2bit-train": 2.0, "ternary-train": 3.0, "binary-train": 5.0}
"""Points of accuracy that may be lost at the 95 % lower bound; what is not here may lose FOUR."""
FOUR = 1.0
RUNGS = ("reconstruct", "gptq", "awq", "nearest")


def lines(found: Found) -> Iterator[Line]:
    for model in (MINILM, MPNET):
        yield from int8(found, model)
        for variant in (*CLASSES[1:], *(TRAINED if model is MINILM else ())):
            yield within(found, model, variant.key, variant.summary)
    size = "bytes"
    for variant in CLASSES[1:]:
        name = f"{MINILM.title}, {variant.summary}: MB in all"
        yield at_most(found, f"minilm-{variant.key}", size, 13, name, "{:.2f}", 1e-6)
    ratio = "binary: blocks in fp32 / packed, bytes"
    yield at_least(found, row_name(MINILM, "binary-train", SEEDS[0]), "stack.ratio", 25, ratio, "{:.1f}")
    yield ladder(found, "output error (1 - mean cosine)", lambda method: error(found, MPNET, method))
    yield ladder(found, "points lost", lambda method: lost(found, MPNET, method))


def int8(found: Found, model: Model) -> Iterator[Line]:
    row, title = f"{model.key}-int8-static", f"{model.title} int8 static"
    yield at_least(found, row, "quality.cosine", 0.999, f"{title}: mean cosine", "{:.5f}")
    yield at_least(found, row, "quality.cosine_p1", 0.997, f"{title}: 1st percentile of cosine", "{:.5f}")
    times = f"{model.key}-latency"
    yield at_least(found, times, f"{row}:speedup@1x128", 3.0, f"{title}: speed over torch fp32 at 1x128")
    other = f"{title}: speed over onnxruntime's dynamic int8 at 1x128"
    yield at_least(found, times, f"{row}:vs_onnxruntime_int8@1x128", 1.0, other)
    yield within(found, model, "int8-static", "int8 static")
    if model is MINILM:
        yield at_most(found, row, "bytes", 23, f"{title}: MB, embeddings included", "{:.2f}", 1e-6)
        yield at_most(found, row, "quantize.seconds", 60, f"{title}: seconds of the whole command", "{:.0f}")
    there = f"{row}-openvino"
    yield at_least(found, there, "quality.cosine", 0.999, f"{title}, same file in OpenVINO: mean cosine", "{:.5f}")
    other = f"{title}, same file in OpenVINO: speed over NNCF's int8 at 1x128"
    yield at_least(found, times, f"{there}:vs_openvino_nncf@1x128", 0.95, other)


def within(found: Found, model: Model, key: str, summary: str) -> Line:
    """Told only when every seed has been run."""
    allowed, drop = POINTS.get(key, FOUR), found.drop(model, key)
    what = f"{model.title}, {summary}: points lost on Rotten Tomatoes"
    seeds = found.seeds(model, key)
    text = interval(None if drop is None else drop.model_dump(), "{:+.2f}", 100)
    if drop is None or drop.low is None or len(seeds) < len(SEEDS):
        return Line(what, f"lower bound >= -{allowed:g}", f"{text}{f' ({len(seeds)} seeds)' if seeds else ''}", None)
    return Line(what, f"lower bound >= -{allowed:g}", text, 100 * drop.low >= -allowed)


def error(found: Found, model: Model, method: str) -> Measurement | None:
    """1 - mean cosine of the 3-bit row."""
    figure = found.figure(f"{model.key}-3bit-{method}", "quality.cosine")
    if figure is None or figure.low is None or figure.high is None:
        return None
    turned = {"value": 1 - figure.value, "low": 1 - figure.high, "high": 1 - figure.low}
    return figure.model_copy(update=turned)


def lost(found: Found, model: Model, method: str) -> Measurement | None:
    """Points of accuracy lost by the 3-bit row."""
    drop = found.drop(model, f"3bit-{method}")
    if drop is None or drop.low is None or drop.high is None:
        return None
    turned = {"value": -100 * drop.value, "low": -100 * drop.high, "high": -100 * drop.low}
    return drop.model_copy(update=turned)


def ladder(found: Found, what: str, of: Callable[[str], Measurement | None]) -> Line:
    """Each rung no worse than the next one; told when all four were run."""
    figures = [of(method) for method in RUNGS]
    texts = [interval(None if figure is None else figure.model_dump(), "{:.4g}") for figure in figures]
    values = [figure.value for figure in figures if figure is not None]
    met = None if len(values) < len(RUNGS) else values == sorted(values)
    title = f"{MPNET.title}, 3 bits, groups of 128, no training: {what}"
    return Line(title, "reconstruction <= GPTQ <= AWQ <= nearest", "; ".join(texts) if values else DASH, met)
