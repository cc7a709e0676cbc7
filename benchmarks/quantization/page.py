"""The table of quantization as Markdown: aims first, then what they rest on, then what failed."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import sanity
from benchmarks.models import MINILM, MPNET, Model
from benchmarks.quality import METRIC
from benchmarks.quantization import aims, classes, vectors
from benchmarks.quantization.found import Found
from benchmarks.quantization.variants import LADDER
from benchmarks.runner import Table, failure
from benchmarks.table import DASH, called, footer, head, line, seconds, show, starred, what_failed
from benchmarks.tuned import SEEDS
from flyweight.artifact import Measurement

VECTORS = (
    "",
    "MB",
    "mean cosine",
    "1st percentile",
    "x torch, 1x32",
    "x torch, 1x128",
    "x torch, 32x128",
    "x ort int8, 1x128",
    "ms at 1x128",
    "s to make (step alone, as estimated)",
    "peak MB to make",
)
CLASSES = (
    "",
    "MB",
    "accuracy",
    "difference, points",
    "seeds",
    "s to make (step alone, as estimated)",
    "peak MB to make",
)


def markdown(table: Table) -> str:
    found = Found.of(table)
    parts = [f"# {table.title}", "", table.about, "", "### Aims", "", *_aims(found)]
    for model in (MINILM, MPNET):
        if not any(name.startswith(f"{model.key}-") for name in found.rows):
            parts += [f"### {model.title}", "", f"Not run: `make bench TABLE={table.name} ROWS='{model.key}-*'`.", ""]
            continue
        parts += [f"### {model.title}: sentence vectors", "", *_vectors(table, found, model)]
        parts += [f"### {model.title}: 3 bits, groups of 128, no training", "", *_ladder(found, model)]
        parts += [f"### {model.title}: Rotten Tomatoes", "", *_classes(table, found, model)]
    parts += [
        *starred(parts),
        *what_failed(table, found.rows),
        *footer(table, found.rows),
    ]
    return "\n".join(parts) + "\n"


def _aims(found: Found) -> Iterator[str]:
    yield from head(("what", "aim", "figure", ""), 2)
    for aim in aims.lines(found):
        yield line((aim.what, aim.aim, aim.figure, aim.verdict))
    yield ""


def _vectors(table: Table, found: Found, model: Model) -> Iterator[str]:
    yield from head(VECTORS)
    times = f"{model.key}-latency"
    for row in (row for row in vectors.rows(model) if row.name != times):
        yield line(
            (
                called(table, row),
                show(found.figure(row.name, "bytes"), "{:.1f}", 1e-6),
                show(found.figure(row.name, "quality.cosine"), "{:.5f}"),
                show(found.figure(row.name, "quality.cosine_p1"), "{:.4f}"),
                *(
                    show(found.figure(times, f"{row.name}:speedup@{point}"), "{:.2f}")
                    for point in ("1x32", "1x128", "32x128")
                ),
                show(found.figure(times, f"{row.name}:vs_onnxruntime_int8@1x128"), "{:.2f}"),
                show(found.figure(times, f"{row.name}:latency_ms.p50@1x128"), "{:.3g}"),
                seconds(found.figure, row.name, "quantize"),
                show(found.figure(row.name, "quantize.peak_bytes"), "{:.0f}", 1e-6),
            )
        )
    yield ""


def _ladder(found: Found, model: Model) -> Iterator[str]:
    yield from head(("", "1 - mean cosine", "minus that of the line above", "points lost"))
    above = None
    for method in reversed(("reconstruct", "gptq", "awq", "hqq", "nearest")):
        row = f"{model.key}-3bit-{method}"
        figure = aims.error(found, model, method)
        step = None if above is None else found.paired(above, row)
        points = aims.lost(found, model, method)
        yield line((LADDER[method], *map(_error, (figure, step)), show(points, "{:+.2f}")))
        above = row if figure is not None else above
    yield ""


def _error(figure: Measurement | None) -> str:
    return show(figure, "{:.5f}")


def _classes(table: Table, found: Found, model: Model) -> Iterator[str]:
    yield from head(CLASSES)
    keys = {"fp32": "fine-tuned, torch fp32", **{key: summary for key, (summary, *_) in classes.PEERS.items()}}
    keys |= {variant.key: f"**Flyweight**, {variant.summary}" for variant in classes.variants(model)}
    for key, summary in keys.items():
        seeds = found.seeds(model, key)
        first = classes.row_name(model, key, seeds[0]) if seeds else ""
        failed = [failure(table.name, classes.row_name(model, key, seed)) for seed in SEEDS]
        missing = "" if seeds else " (failed)" if any(failed) else " (not run)"
        drop = None if key == "fp32" else found.drop(model, key)
        cells = [f"{summary}{missing}", show(found.figure(first, "bytes"), "{:.1f}", 1e-6)]
        cells += [show(found.accuracy(model, key), "{:.1f}", 100), show(drop, "{:+.2f}", 100)]
        cells += [", ".join(map(str, seeds)) or DASH, seconds(found.figure, first, "quantize")]
        yield line((*cells, show(found.figure(first, "quantize.peak_bytes"), "{:.0f}", 1e-6)))
    for row in sanity.ROWS:
        figure = found.figure(row.name, METRIC)
        drop = found.beside(row.name, model)
        yield line((called(table, row), DASH, show(figure, "{:.1f}", 100), show(drop, "{:+.2f}", 100), *[DASH] * 3))
    yield ""
