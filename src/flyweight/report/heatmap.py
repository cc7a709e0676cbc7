"""What each part of a model costs to lose, as one HTML file: heat maps with numbers on hover, and the same in tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from flyweight.measure.harm import Harm, Kind, Part, Span, signed
from flyweight.report.figures import number
from flyweight.report.svg import LETTER, WIDTH, figure, fit, node, text

__all__ = ["Cell", "Map", "heat_page", "heatmap", "maps", "span_text"]

LEFT, TOP, GAP = 44.0, 34.0, 1.5
EXTREMES = 10
SHADES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the legend, darkest last


class Cell(NamedTuple):
    """told: whether the value can be told from zero; hover: what the pointer shows"""

    value: float
    told: bool
    hover: str


class Map(NamedTuple):
    """A drawing and the parts in it. cells: {(row, column): Cell}; the rows are blocks."""

    title: str
    rows: list[str]
    columns: list[str]
    across: str
    cells: dict[tuple[int, int], Cell]


def heat_page(harm: Harm, model: str) -> str:
    """The whole page; `model` is what it is called there. Everything is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flyweight", "report"), undefined=jinja2.StrictUndefined, autoescape=True
    )
    kinds: tuple[tuple[Kind, str], ...] = (("head", "Heads"), ("neurons", "Neuron groups"))
    ranked = [(title, *harm.extremes(kind, EXTREMES)) for kind, title in kinds]
    return environment.get_template("sensitivity.html").render(
        model=model,
        harm=harm,
        metric=(harm.metric or "").replace("_", " "),
        whole=[(name, f"{value:.4f}" if name == "loss" else number(value, "share")) for name, value in harm.whole.items()],
        drawings=[(one.title, heatmap(one, harm.cost)) for one in maps(harm) if one.cells],
        ranked=[(title, [_row(part) for part in worst], [_row(part) for part in best]) for title, worst, best in ranked],
        rows=[_row(part) for part in harm.parts],
    )  # fmt: skip


def maps(harm: Harm) -> list[Map]:
    """For every stack: heads of each attention, neuron groups, whole parts."""
    found = []
    for stack in harm.stacks():
        heads = harm.of("head", stack)
        for attention in sorted({part.attention or 0 for part in heads}):
            mine = [part for part in heads if part.attention == attention]
            crossed = "heads of its cross-attention" if attention else "heads"
            found.append(_map(f"{stack}: {crossed}", "head", mine, {id(part): part.head or 0 for part in mine}))
        groups = harm.of("neurons", stack)
        numbers = {id(part): part.number or 0 for part in groups}
        found.append(_map(f"{stack}: neuron groups", "group, 0 writes most", groups, numbers))
        found.append(_whole_parts(harm, stack))
    return found


def _map(title: str, across: str, parts: Sequence[Part], column: Mapping[int, int]) -> Map:
    blocks = 1 + max((part.block for part in parts), default=-1)
    wide = 1 + max(column.values(), default=-1)
    cells = {(part.block, column[id(part)]): _cell(part) for part in parts}
    return Map(title, [str(i) for i in range(blocks)], [str(i) for i in range(wide)], across, cells)


def _whole_parts(harm: Harm, stack: str) -> Map:
    parts = [*harm.of("attention", stack), *harm.of("feed-forward", stack), *harm.of("layer", stack)]
    names = list(dict.fromkeys(part.name.partition(", ")[2] for part in parts))
    numbers = {id(part): names.index(part.name.partition(", ")[2]) for part in parts}
    return _map(f"{stack}: whole parts", "", parts, numbers)._replace(columns=names)


def _cell(part: Part) -> Cell:
    changed = "" if part.change is None else f"; {number(part.change.value, 'share', signed=True)}"
    return Cell(part.cost.value, part.cost.told, f"{part.name}: {span_text(part.cost)}{changed}")


def span_text(span: Span) -> str:
    return f"{signed(span.value)} ({signed(span.low)} to {signed(span.high)})"


def _row(part: Part) -> dict[str, Any]:
    change = part.change
    return {
        "name": part.name,
        "cost": signed(part.cost.value),
        "span": f"{signed(part.cost.low)} to {signed(part.cost.high)}",
        "change": "" if change is None else number(change.value, "share", signed=True),
        "changed": "" if change is None else f"{100 * change.low:+.1f} to {100 * change.high:+.1f}",
        "weights": f"{part.weights:,}",
    }


def heatmap(one: Map, unit: str) -> Markup:
    """Rows from top to bottom; the shade grows with the root of the value, as few parts cost by far the most.

    A part that cannot be told from zero is struck through; what is not there any more stays empty.
    """
    most = max((abs(cell.value) for cell in one.cells.values()), default=0.0)
    wide = (WIDTH - LEFT) / max(1, len(one.columns))
    high = min(26.0, max(9.0, 312.0 / max(1, len(one.rows))))
    bottom = TOP + high * len(one.rows)
    parts = [text(0, 12, "block", class_="name"), text(LEFT, 12, one.across, class_="name")]
    parts += _labels(one, wide, high)
    for (row, column), cell in one.cells.items():
        x, y = LEFT + column * wide, TOP + row * high
        parts.append(_square(x, y, wide - GAP, high - GAP, cell, most))
    parts += _legend(bottom + 22, most, unit)
    dearest, cheapest = (
        pick(one.cells.values(), key=lambda cell: cell.value).hover if one.cells else "" for pick in (max, min)
    )
    said = f"{unit.capitalize()}. Costs most: {dearest}. Costs least: {cheapest}. All numbers stand in the table below."
    return figure(f"What losing a part costs, {one.title}", said, bottom + 66, parts)


def _labels(one: Map, wide: float, high: float) -> list[Markup]:
    """Of numbers those that have room; names are shortened."""
    numbered = all(name.isdigit() for name in one.columns)
    longest = max((len(name) for name in one.columns), default=1) * LETTER + 6 if numbered else 0
    every_column, every_row = max(1, math.ceil(longest / wide)), max(1, math.ceil(13 / high))
    across = [
        text(LEFT + (i + 0.5) * wide, TOP - 6, fit(name, max(wide, longest)), "middle", "tick")
        for i, name in enumerate(one.columns)
        if i % every_column == 0
    ]
    down = [
        text(LEFT - 6, TOP + (i + 0.5) * high + 4, name, "end", "tick")
        for i, name in enumerate(one.rows)
        if i % every_row == 0
    ]
    return [*across, *down]


def _square(x: float, y: float, wide: float, high: float, cell: Cell, most: float) -> Markup:
    shade = math.sqrt(abs(cell.value) / most) if most else 0.0
    kind = "harm" if cell.value >= 0 else "help"
    box: dict[str, Any] = {"x": float(x), "y": float(y), "width": float(wide), "height": float(high)}
    inside = [
        node("title", cell.hover),
        node("rect", class_="ground", **box),
        node("rect", class_=kind, fill_opacity=f"{shade:.3f}", **box),
    ]
    if not cell.told:
        inside.append(node("line", class_="strike", x1=x, y1=y + high, x2=x + wide, y2=y))
    return node("g", inside, class_="cell")


def _legend(y: float, most: float, unit: str) -> list[Markup]:
    """Swatches from nothing to the largest value, and what the other two marks mean."""
    parts = []
    step = WIDTH / len(SHADES)
    for i, shade in enumerate(SHADES):
        value = most * shade**2
        parts.append(_square(i * step, y - 10, 12.0, 12.0, Cell(value, True, unit), most))
        parts.append(text(i * step + 17, y, signed(value), class_="tick"))
    parts.append(_square(0.0, y + 12, 12.0, 12.0, Cell(-most / 2, True, "better without"), most))
    parts.append(text(17, y + 22, "better without", class_="tick"))
    parts.append(_square(2 * step, y + 12, 12.0, 12.0, Cell(0.0, False, "cannot be told from zero"), most))
    parts.append(text(2 * step + 17, y + 22, "cannot be told from zero", class_="tick"))
    return parts
