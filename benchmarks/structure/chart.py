"""The curve without retraining as an SVG that stands by itself, drawn by the report's own plots."""

from __future__ import annotations

from markupsafe import Markup

from benchmarks.structure.asks import CURVE, SPEEDUPS, STAGES, curve_key
from benchmarks.structure.found import Found
from flyweight.report.charts import Curve, Scale, curves
from flyweight.report.svg import WIDTH, mark, text

COLOURS = ("#0b6bcb", "#c2570c", "#6b7280", "#0f766e", "#9d2f8b", "#8a6d00")
BELOW, ROW = 236, 18
TITLE = "Points lost without retraining"


def drawn(found: Found) -> str | None:
    """None where no point was run. Stages that share a colour differ by their marks."""
    lines = [Curve(STAGES[stage][0], number, points) for number, (stage, points) in enumerate(points_of(found).items())]
    lines = [line for line in lines if line.points]
    plot = curves(
        TITLE, lines, Scale("times fewer FLOPs", "{:g}x".format), Scale("points of accuracy lost", "{:.1f}".format)
    )
    if plot is None:
        return None
    keys = [
        part
        for at, line in enumerate(lines)
        for part in (mark(line.kind, 70, BELOW + ROW * at - 4, 4.0), text(82, BELOW + ROW * at, line.name))
    ]
    height = BELOW + ROW * len(lines)
    inside = str(plot).replace('viewBox="0 0 420 226"', f'viewBox="0 0 {WIDTH} {height}"', 1)
    inside = inside.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="840" ', 1)
    return inside.removesuffix("</svg>") + style() + str(Markup("").join(keys)) + "</svg>\n"


def points_of(found: Found) -> dict[str, list[tuple[float, float]]]:
    """{stage: [(times fewer FLOPs, points lost)]}; every line begins with the reference."""
    asks = {ask.key: ask for ask in CURVE}
    every = {}
    for stage in STAGES:
        drops = [(speedup, found.drop(asks[curve_key(stage, speedup)])) for speedup in SPEEDUPS]
        some = [(speedup, -100 * drop.value) for speedup, drop in drops if drop is not None]
        every[stage] = [(1.0, 0.0), *some] if some else []
    return every


def style() -> str:
    """On white, whatever it is shown on."""
    series = "".join(f".fill.c{i}{{fill:{c}}}.path.c{i}{{stroke:{c}}}" for i, c in enumerate(COLOURS))
    rules = "svg{background:#fff;font-family:sans-serif}text{font-size:12px;fill:#1b1f24}.tick,.name{fill:#57606a}"
    return (
        f"<style>{rules}.grid{{stroke:#e4e7eb}}.rule{{stroke:#c8cdd3}}.path{{stroke-width:2;fill:none}}{series}</style>"
    )
