"""The table of structure as Markdown: aims first, then what they rest on, then what failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks import runner, sanity
from benchmarks.models import MINILM, MPNET
from benchmarks.quality import METRIC
from benchmarks.runner import Table, failure
from benchmarks.structure import aims, chart, large, zeros
from benchmarks.structure.asks import (
    CURVE,
    HANDED,
    ONE_SHOT,
    RECOVERED,
    SPEEDUPS,
    STAGES,
    STUDENTS,
    TENFOLD,
    VOCABULARY,
    ZEROS,
    Ask,
    curve_key,
)
from benchmarks.structure.found import Found
from benchmarks.structure.rows import MEANT
from benchmarks.table import DASH, called, footer, head, line, seconds, show, star, starred, what_failed
from benchmarks.tuned import SEEDS

COLUMNS = (
    "",
    "MB",
    "accuracy",
    "minus the reference, points",
    "minus its control, points",
    "seeds",
    "x fp32, 1x32",
    "x fp32, 1x128",
    "ms at 1x128",
    "s to make (step alone, as estimated)",
    "peak MB to make",
)
SMALL = Ask("fp32", "fine-tuned, torch fp32", "finetune", "", 0)
LARGE = SMALL._replace(model=MPNET, seeds=(0,))
SECTIONS: tuple[tuple[str, Sequence[Ask], bool], ...] = (
    (f"{MPNET.title}: a wish of speed, without retraining", (LARGE, *ONE_SHOT), True),
    (f"{MPNET.title}: with recovery", (LARGE, *RECOVERED, *TENFOLD), False),
    (f"{MPNET.title} as the teacher of {MINILM.title}", (LARGE, SMALL, *HANDED), False),
    (f"{MINILM.title}: students", (SMALL, *STUDENTS), True),
    (f"{MINILM.title}: vocabulary", (SMALL, VOCABULARY), False),
    (f"{MINILM.title}: zeros, no training", (SMALL, *ZEROS), False),
)
"""(title, rows, whether the rows without a neural network stand below)"""


def markdown(table: Table) -> str:
    found = Found.of(table)
    parts = [f"# {table.title}", "", table.about, "", "### Aims", "", *_aims(found)]
    for title, asks, beside in SECTIONS:
        parts += [f"### {title}", "", *_section(table, found, asks, beside)]
        if VOCABULARY in asks:
            parts += _vocabulary(found)
        if ZEROS[0] in asks:
            parts += _times(found)
    parts += [f"### {MINILM.title}: the curve without retraining", "", *_curve(table, found)]
    parts += [f"### {large.TITLE}", "", *_large(table, found)]
    parts += [*starred(parts), *what_failed(table, found.rows), *footer(table, found.rows)]
    return "\n".join(parts) + "\n"


def _aims(found: Found) -> Iterator[str]:
    yield from head(("what", "aim", "figure", ""), 2)
    for aim in aims.lines(found):
        yield line((aim.what, aim.aim, aim.figure, aim.verdict))
    yield ""


def _section(table: Table, found: Found, asks: Sequence[Ask], beside: bool) -> Iterator[str]:
    yield from head(COLUMNS)
    for ask in asks:
        yield line(_cells(table, found, ask))
    for row in sanity.ROWS if beside else ():
        figure, drop = found.figure(row.name, METRIC), found.beside(row.name, asks[0].model, asks[0].seeds)
        cells = (called(table, row), DASH, show(figure, "{:.1f}", 100), show(drop, "{:+.2f}", 100))
        yield line((*cells, *[DASH] * (len(COLUMNS) - len(cells))))
    yield ""


def _cells(table: Table, found: Found, ask: Ask) -> list[str]:
    seeds = found.seeds(ask)
    failed = any(failure(table.name, ask.row(seed)) for seed in ask.seeds)
    missing = "" if seeds else " (failed)" if failed else " (not run)"
    whole = ask.key == SMALL.key
    name = f"{ask.model.title}, {ask.summary}" if whole else ask.summary
    first = ask.row(seeds[0]) if seeds else ""
    return [
        f"{name}{missing}",
        show(found.first(ask, "bytes"), "{:.1f}", 1e-6),
        show(found.accuracy(ask), "{:.1f}", 100),
        show(None if whole else found.drop(ask), "{:+.2f}", 100),
        show(found.over(ask) if ask.control else None, "{:+.2f}", 100),
        ", ".join(map(str, seeds)) or DASH,
        *(show(found.first(ask, key), "{:.2f}") for key in ("speedup@1x32", MEANT)),
        show(found.first(ask, "latency_ms.p50@1x128"), "{:.3g}"),
        seconds(found.figure, first, ask.verb),
        show(found.figure(first, f"{ask.verb}.peak_bytes"), "{:.0f}", 1e-6),
    ]


def _vocabulary(found: Found) -> Iterator[str]:
    yield from head(
        (
            "seed",
            "tokens less",
            "texts whose tokens all stay",
            "tokens a text before",
            "after",
            "largest change of a logit there",
        )
    )
    for seed in SEEDS:
        row = VOCABULARY.row(seed)
        keys = ("removed", "kept_share", "tokens_before", "tokens_after", "moved")
        forms = (("{:.0f}", 1), ("{:.1f} %", 100), ("{:.2f}", 1), ("{:.2f}", 1), ("{:.2g}", 1))
        figures = [found.figure(row, f"vocabulary.{key}") for key in keys]
        yield line((str(seed), *(show(one, *form) for one, form in zip(figures, forms, strict=True))))
    yield ""


def _times(found: Found) -> Iterator[str]:
    """How many times faster than dense in the same engine."""
    points = ("1x32", "1x128", "32x128")
    yield from head(("zeros", *(f"x dense in {engine}, {point}" for engine in zeros.ENGINES for point in points)))
    for kind in zeros.KINDS:
        keys = [
            f"{zeros.candidate(kind, engine)}:{zeros.faster(engine)}@{point}"
            for engine in zeros.ENGINES
            for point in points
        ]
        yield line((kind, *(show(found.figure(zeros.NAME, key), "{:.2f}") for key in keys)))
    yield ""


def _curve(table: Table, found: Found) -> Iterator[str]:
    """Points against the reference; below, how much faster these shapes are."""
    asks = {ask.key: ask for ask in CURVE}
    yield from head(("", *(f"{speedup:g}x fewer FLOPs" for speedup in SPEEDUPS)))
    for stage, (summary, _) in STAGES.items():
        drops = [found.drop(asks[curve_key(stage, speedup)]) for speedup in SPEEDUPS]
        yield line((summary, *(show(drop, "{:+.2f}", 100) for drop in drops)))
    times = [found.first(asks[curve_key("linear", speedup)], MEANT) for speedup in SPEEDUPS]
    yield line(("x fp32 at 1x128, of these shapes", *(show(figure, "{:.2f}") for figure in times)))
    seeds = sorted({seed for ask in CURVE for seed in found.seeds(ask)})
    yield from ("", f"Points minus the reference; seeds {', '.join(map(str, seeds)) or DASH}.", "")
    if (drawing := chart.drawn(found)) is not None:
        path = runner.RESULTS / f"{table.name}-curve.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(drawing, encoding="utf-8")
        yield from (f"![{chart.TITLE}]({path.name})", "")


def _large(table: Table, found: Found) -> Iterator[str]:
    yield from head(
        ("", "s of the step", "estimated", "ratio", "peak MB of the step", "estimated", "ratio", "s of the command")
    )
    rows = {row.name: row for row in large.ROWS}
    for key, (_, verb, *_) in large.WAYS.items():
        row = rows[large.row_of(key)]
        step, told, peak, expected, whole = (
            found.figure(row.name, f"{verb}.{key}")
            for key in ("step_seconds", "estimated_seconds", "step_peak_bytes", "estimated_bytes", "seconds")
        )
        ratios = [show(found.figure(row.name, f"{name}_ratio"), "{:.2f}") for name in ("time", "memory")]
        times = (f"{show(step, '{:.0f}')}{star(step)}", show(told, "{:.0f}"), ratios[0])
        memory = (show(peak, "{:.0f}", 1e-6), show(expected, "{:.0f}", 1e-6), ratios[1])
        yield line((called(table, row), *times, *memory, f"{show(whole, '{:.0f}')}{star(whole)}"))
    yield ""
