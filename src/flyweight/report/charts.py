"""The kinds of plot in the report; each takes plain numbers and gives SVG, or nothing where there is nothing to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from markupsafe import Markup

from flyweight.report.svg import LETTER, WIDTH, Axis, Box, axis, figure, fit, mark, node, place, text

__all__ = ["Bar", "Curve", "Dot", "Scale", "bars", "curves", "dots", "scatter", "stacks"]

Write = Callable[[float], str]
ROW = 24.0
LOG_FROM = 6.0  # axes become logarithmic where the largest value is this many times the smallest


class Scale(NamedTuple):
    """What an axis is about, and how its values are written."""

    name: str
    write: Write


@dataclass(frozen=True)
class Dot:
    """A model in a scatter plot. kind: number of its series (colour and shape); x, y: (value, low, high)."""

    name: str
    kind: int
    x: tuple[float, float | None, float | None]
    y: tuple[float, float | None, float | None]


def scatter(title: str, dots: Sequence[Dot], x: Scale, y: Scale) -> Markup | None:
    """One mark a model with its intervals as bars. x may be logarithmic."""
    if not dots:
        return None
    height, frame = 310.0, Box(62, 24, WIDTH - 76, 236)
    xs = [v for dot in dots for v in dot.x if v is not None]
    ys = [v for dot in dots for v in dot.y if v is not None]
    across = axis(xs, frame.x, frame.x + frame.width, x.write, log=_wide([dot.x[0] for dot in dots]))
    up = axis(ys, frame.y + frame.height, frame.y, y.write)
    parts = _frame(frame, across, up, x.name + (" (logarithmic)" if across.log else ""), y.name)
    taken: list[Box] = []
    for dot in dots:
        parts += _whiskers(dot, across, up)
        px, py = across.at(dot.x[0]), up.at(dot.y[0])
        taken.append(Box(px - 7, py - 7, 14, 14))
        if dot.y[1] is not None and dot.y[2] is not None:  # no label across an interval either
            top = up.at(dot.y[2])
            taken.append(Box(px - 4, top, 8, up.at(dot.y[1]) - top))
    for dot in dots:
        px, py = across.at(dot.x[0]), up.at(dot.y[0])
        parts.append(mark(dot.kind, px, py))
        named = place(fit(dot.name, WIDTH / 3), px, py, frame, taken)
        parts += [named] if named else []
    said = "; ".join(f"{dot.name}: {x.write(dot.x[0])}, {y.write(dot.y[0])}" for dot in dots)
    return figure(title, said, height, parts)


def _whiskers(dot: Dot, across: Axis, up: Axis) -> list[Markup]:
    px, py = across.at(dot.x[0]), up.at(dot.y[0])
    class_ = f"line c{dot.kind % 6}"
    parts = []
    if dot.x[1] is not None and dot.x[2] is not None:
        parts.append(node("line", x1=across.at(dot.x[1]), x2=across.at(dot.x[2]), y1=py, y2=py, class_=class_))
    if dot.y[1] is not None and dot.y[2] is not None:
        ends = up.at(dot.y[1]), up.at(dot.y[2])
        parts.append(node("line", x1=px, x2=px, y1=ends[0], y2=ends[1], class_=class_))
        parts += [node("line", x1=px - 4, x2=px + 4, y1=end, y2=end, class_=class_) for end in ends]
    return parts


def _frame(frame: Box, across: Axis, up: Axis, x_name: str, y_name: str) -> list[Markup]:
    """Grid, ticks and the names of both axes."""
    bottom, right = frame.y + frame.height, frame.x + frame.width
    parts = [node("line", x1=frame.x, x2=right, y1=bottom, y2=bottom, class_="rule")]
    for value, written in up.ticks:
        parts.append(node("line", x1=frame.x, x2=right, y1=up.at(value), y2=up.at(value), class_="grid"))
        parts.append(text(frame.x - 6, up.at(value) + 4, written, "end", "tick"))
    last = -100.0
    for value, written in across.ticks:
        at, wide = across.at(value), len(written) * LETTER
        parts.append(node("line", x1=at, x2=at, y1=frame.y, y2=bottom, class_="grid"))
        if at - wide / 2 > last + 8 and at + wide / 2 <= WIDTH:  # a tick text never runs into the one before it
            parts.append(text(at, bottom + 16, written, "middle", "tick"))
            last = at + wide / 2
    parts.append(text(frame.x + frame.width / 2, bottom + 34, x_name, "middle", "name"))
    parts.append(text(0, 11, y_name, "start", "name"))
    return parts


def _wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) >= LOG_FROM


class Bar(NamedTuple):
    """name: beside the bar; kind: its series; written: behind it; low, high: an interval drawn over its end."""

    name: str
    kind: int
    value: float
    written: str
    low: float | None = None
    high: float | None = None


def bars(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], names: float = 92.0) -> Markup | None:
    """Horizontal bars from zero; each group has a heading and its own scale. names: room for the names on the left."""
    groups = [(heading, items) for heading, items in groups if items]
    if not groups:
        return None
    parts, y, said = [], 4.0, []
    for heading, items in groups:
        if heading:
            y += 16
            parts.append(text(0, y, heading, "start", "name"))
            y += 6
        room = WIDTH - names - 8 - LETTER * max(len(bar.written) for bar in items)
        top = max([v for bar in items for v in (bar.value, bar.high or 0)] + [1e-12])
        for bar in items:
            long = room * max(bar.value, 0) / top
            parts.append(text(names - 6, y + 14, fit(bar.name, names - 6), "end", "label"))
            parts.append(
                node("rect", x=names, y=y + 4, width=max(long, 1.5), height=14, rx=2, class_=f"fill c{bar.kind % 6}")
            )
            after = long
            if bar.low is not None and bar.high is not None:
                after = max(long, room * bar.high / top)
                ends = names + room * bar.low / top, names + after
                parts.append(node("line", x1=ends[0], x2=ends[1], y1=y + 11, y2=y + 11, class_="spread"))
            parts.append(text(names + after + 6, y + 15, bar.written, "start", "value"))
            y += ROW
        said.append(f"{heading}: " + ", ".join(f"{bar.name} {bar.written}" for bar in items))
        y += 6
    return figure(title, "; ".join(said), y, parts)


def dots(title: str, items: Sequence[Bar], scale: Scale, names: float = 92.0) -> Markup | None:
    """One mark a row on a common axis that need not begin at zero, its text behind it."""
    if not items:
        return None
    values = [v for bar in items for v in (bar.value, bar.low, bar.high) if v is not None]
    right = WIDTH - 10 - LETTER * max(len(bar.written) for bar in items)
    across, bottom = axis(values, names, right, scale.write), ROW * len(items) + 4
    parts = [node("line", x1=across.at(v), x2=across.at(v), y1=2, y2=bottom, class_="grid") for v, _ in across.ticks]
    last = -100.0
    for value, written in across.ticks:
        if across.at(value) - len(written) * LETTER / 2 > last + 8:
            parts.append(text(across.at(value), bottom + 15, written, "middle", "tick"))
            last = across.at(value) + len(written) * LETTER / 2
    for row, bar in enumerate(items):
        y, x = ROW * row + 14, across.at(bar.value)
        parts.append(text(names - 6, y + 4, fit(bar.name, names - 6), "end", "label"))
        if row:
            before = across.at(items[row - 1].value), y - ROW
            parts.append(node("line", x1=before[0], y1=before[1], x2=x, y2=y, class_=f"line c{bar.kind % 6}"))
        parts.append(text(right + 8, y + 4, bar.written, "start", "value"))
    parts += [mark(bar.kind, across.at(bar.value), ROW * row + 14) for row, bar in enumerate(items)]
    return figure(title, ", ".join(f"{bar.name} {bar.written}" for bar in items), bottom + 22, parts)


def stacks(title: str, rows: Sequence[tuple[str, Sequence[Bar]]]) -> Markup | None:
    """One bar a row, made of parts; the legend names the parts, and the row says its sum."""
    rows = [(name, [part for part in parts if part.value > 0]) for name, parts in rows]
    rows = [(name, parts) for name, parts in rows if parts]
    if not rows:
        return None
    top = max(sum(part.value for part in parts) for _, parts in rows)
    drawn, y, said = [], 0.0, []
    for name, parts in rows:
        drawn.append(text(0, y + 13, fit(name, WIDTH), "start", "label"))
        x = 0.0
        for part in parts:
            long = WIDTH * part.value / top
            shape = node("rect", node("title", f"{part.name} {part.written}"), x=x, y=y + 19, width=max(long - 1, 0.5),
                         height=20, class_=f"fill p{part.kind % 6}")  # fmt: skip
            drawn.append(shape)
            if len(part.written) * LETTER + 8 < long:
                drawn.append(text(x + long / 2, y + 33, part.written, "middle", "in"))
            x += long
        said.append(f"{name}: " + ", ".join(f"{part.name} {part.written}" for part in parts))
        y += 50
    return figure(title, "; ".join(said), y, drawn)


class Curve(NamedTuple):
    """A named line through points (x, y)."""

    name: str
    kind: int
    points: Sequence[tuple[float, float]]


def curves(title: str, lines: Sequence[Curve], x: Scale, y: Scale) -> Markup | None:
    """Lines with marks at their points, named at their ends where there is room and always in the legend."""
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    frame = Box(62, 24, WIDTH - 80, 150)
    across = axis([p[0] for line in lines for p in line.points], frame.x, frame.x + frame.width, x.write)
    up = axis([p[1] for line in lines for p in line.points], frame.y + frame.height, frame.y, y.write)
    parts = _frame(frame, across, up, x.name, y.name)
    for line in lines:
        at = [(across.at(a), up.at(b)) for a, b in line.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
        parts.append(node("polyline", points=path, class_=f"path c{line.kind % 6}"))
        if len(at) <= 40:
            parts += [mark(line.kind, a, b, 3.0) for a, b in at]
    said = "; ".join(
        f"{line.name}: from {y.write(line.points[0][1])} to {y.write(line.points[-1][1])}" for line in lines
    )
    return figure(title, said, 226, parts)
