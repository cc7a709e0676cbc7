"""Tables for the terminal."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flyweight.artifact import Manifest, Measurement
from flyweight.report.figures import change, higher_is_better, interval, label, model_name, ordered, show

__all__ = ["compare_table", "table"]

Figures = Mapping[str, Measurement]
# they are in the report, or stand in the column of changes; a terminal has little room
LEFT_OUT = (".p90@", ".p99@", ".difference", "bytes.", "speedup")
NARROW, ROOMY = 80, 120


def table(manifest: Manifest, width: int | None = None, color: bool | None = None) -> str:
    """The result beside its references, with what changed, and the verdict. width, color: by default as stdout has them.

    Intervals are left out below ROOMY columns.
    """
    figures, wide = manifest.measurements, _width(width)
    result = figures.get("result", {})
    others = [name for name in figures if name != "result"]
    first = next(iter(others), "")
    grid = _grid("figure", *(model_name(name) for name in others), "result", *(["change"] if first else []))
    for key in _rows(result):
        cells = [Text(show(key, figures[name][key]) if key in figures[name] else "-") for name in others]
        row = [Text(label(key)), *cells, _cell(key, result[key], wide)]
        if first:
            row.append(_changed(key, result, (first, figures[first]), wide))
        grid.add_row(*row)
    lines = [_render(grid, wide, color)]
    if first:
        lines.append(
            f"change: result against {model_name(first)}; latency at batch x tokens"
            + ("; in brackets 95 % intervals, of memory smallest and largest" if wide >= ROOMY else "")
        )
    lines += [line for report in manifest.kernels.values() for line in report.text]
    if manifest.verdict:
        lines.append(manifest.verdict.text)
    return "\n".join(lines)


def compare_table(found: Mapping[str, Figures], width: int | None = None, color: bool | None = None) -> str:
    """Models side by side; `*` marks the best of a row, `~` those whose interval meets the best one's."""
    wide = _width(width)
    grid = _grid("figure", *(model_name(name) for name in found))
    keys = [key for figures in found.values() for key in figures]
    for key in _rows(keys):
        marks = _marks(key, {name: figures[key] for name, figures in found.items() if key in figures})
        cells = []
        for name, figures in found.items():
            if key not in figures:
                cells.append(Text("-  ", style="dim"))
                continue
            cell = _cell(key, figures[key], wide if len(found) < 4 else 0)
            cell.append(f" {marks[name]}")
            if marks[name] == "*":
                cell.stylize("bold green")
            cells.append(cell)
        grid.add_row(Text(label(key)), *cells)
    return _render(grid, wide, color) + "\n* best of the row; ~ its 95 % interval meets that of the best"


def _rows(keys: Figures | list[str]) -> list[str]:
    return [key for key in ordered(keys) if not any(part in key for part in LEFT_OUT)]


def _grid(first: str, *others: str) -> Table:
    grid = Table(show_edge=False, pad_edge=False, header_style="bold")
    grid.add_column(first, overflow="fold")
    for name in others:
        grid.add_column(Text(name), justify="right", overflow="fold")
    return grid


def _cell(key: str, figure: Measurement, wide: int) -> Text:
    cell = Text(show(key, figure))
    if wide >= ROOMY and (span := interval(key, figure)):
        cell.append(f" ({span})", style="dim")
    return cell


def _changed(key: str, result: Figures, reference: tuple[str, Figures], wide: int) -> Text:
    """Green where it got better, red where it got worse; from the paired figure, which has an interval, where there is one."""
    name, figures = reference
    if (paired := result.get(f"{key}.difference")) is not None:
        cell, gain = _cell(f"{key}.difference", paired, wide), paired.value
    elif (paired := result.get(key.replace("latency_ms.p50", f"speedup.{name}"))) is not None and "latency" in key:
        cell, gain = _faster(key, paired, wide), paired.value - 1
    elif key in figures:
        cell = Text(change(key, result[key], figures[key]))
        gain = (result[key].value - figures[key].value) * (1 if higher_is_better(key) else -1)
    else:
        return Text("")
    if gain and cell.plain != "same":
        cell.stylize("green" if gain > 0 else "red")
    return cell


def _faster(key: str, ratio: Measurement, wide: int) -> Text:
    """A speed-up below 1 is told as how many times slower, with its interval turned round."""
    if ratio.value < 1:
        low, high = (None if side is None else 1 / side for side in (ratio.high, ratio.low))
        ratio = ratio.model_copy(update={"value": 1 / ratio.value, "low": low, "high": high})
        word = "slower"
    else:
        word = "faster"
    value, space, span = _cell(key, ratio, wide).plain.partition(" ")
    return Text(f"{value} {word}{space}{span}")


def _marks(key: str, figures: Figures) -> dict[str, str]:
    if len(figures) < 2 or len({figure.value for figure in figures.values()}) == 1:
        return dict.fromkeys(figures, " ")
    pick = max if higher_is_better(key) else min
    best = pick(figures, key=lambda name: figures[name].value)

    def mark(name: str) -> str:
        if name == best:
            return "*"
        return "~" if _meet(figures[name], figures[best]) else " "

    return {name: mark(name) for name in figures}


def _meet(one: Measurement, other: Measurement) -> bool:
    if None in (one.low, one.high, other.low, other.high):
        return one.value == other.value
    assert one.low is not None  # for the type checker: the line above said so
    assert one.high is not None
    assert other.low is not None
    assert other.high is not None
    return one.low <= other.high and other.low <= one.high


def _width(width: int | None) -> int:
    return width or max(NARROW, shutil.get_terminal_size((140, 24)).columns)


def _render(grid: Table, wide: int, color: bool | None) -> str:
    color = sys.stdout.isatty() if color is None else color
    out = io.StringIO()
    console = Console(file=out, width=wide, force_terminal=color, color_system="standard" if color else None)
    console.print(grid)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").splitlines())
