"""The little SVG that the report's plots need. Everything that is text is escaped; colours are CSS classes of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["LETTER", "Axis", "Box", "axis", "figure", "fit", "mark", "node", "place", "text"]

WIDTH = 420  # one plot; the page shows it between 300 and 560 pixels wide, so letters stay readable
LETTER = 6.9  # mean width of a letter at 12 px, the page's size for plots; only for keeping labels apart


def node(tag: str, content: Iterable[Markup] | Markup | str = "", **attributes: object) -> Markup:
    """An element; `class_` and `stroke_width` become class and stroke-width, numbers are written with one decimal."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_plain(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inside = escape(content) if isinstance(content, str) else Markup("").join(content)
    return Markup(f"<{tag}{given}>{inside}</{tag}>")


def _plain(value: object) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, content: str, anchor: str = "start", class_: str | None = None) -> Markup:
    return node("text", content, x=float(x), y=float(y), text_anchor=anchor, class_=class_)


def fit(content: str, room: float) -> str:
    """As much of it as fits into `room`, with an ellipsis where some is missing."""
    most = max(2, int(room / LETTER))
    return content if len(content) <= most else content[: most - 1].rstrip() + "…"


def figure(title: str, description: str, height: float, parts: Iterable[Markup]) -> Markup:
    """A drawing WIDTH wide that a screen reader announces by title and description."""
    head = [node("title", title), node("desc", description)]
    box = f"0 0 {WIDTH} {math.ceil(height)}"
    return node("svg", [*head, *parts], viewBox=box, role="img", aria_label=f"{title}. {description}")


def mark(kind: int, x: float, y: float, size: float = 5.0) -> Markup:
    """Circle, square, diamond or triangle in the colour of series `kind`: told apart without colour, too."""
    class_ = f"fill c{kind % 6}"
    shape = kind % 4
    if shape == 0:
        return node("circle", cx=float(x), cy=float(y), r=size, class_=class_)
    if shape == 1:
        s = size * 0.9
        return node("rect", x=x - s, y=y - s, width=2 * s, height=2 * s, class_=class_)
    s = size * 1.25
    corners = [(0, -s), (s, 0), (0, s), (-s, 0)] if shape == 2 else [(0, -s), (s, s * 0.8), (-s, s * 0.8)]
    return node("polygon", points=" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners), class_=class_)


@dataclass(frozen=True)
class Axis:
    """Values to positions. ticks: [(value, its text)], none outside the axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def at(self, value: float) -> float:
        low, high, here = (math.log10(v) if self.log else v for v in (self.low, self.high, max(value, self._least)))
        share = min(1.0, max(0.0, (here - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    @property
    def _least(self) -> float:
        return self.low if self.log else -math.inf


def axis(values: Sequence[float], start: float, end: float, write: Callable[[float], str], log: bool = False) -> Axis:
    """An axis over all `values` with some room and round ticks. Logarithmic where asked for and everything is positive.

    A single value gets room on both sides; `write` makes the text of a tick.
    """
    low, high = min(values), max(values)
    if log and low > 0:
        return _log_axis(low, high, start, end, write)
    room = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = low - room, high + room
    step = _round_step((high - low) / 5)
    first = math.ceil(low / step)
    values = [n * step for n in range(first, math.floor(high / step) + 1)]
    ticks = [(value, write(value)) for value in values if low <= value <= high]
    return Axis(low, high, start, end, False, _sparse(ticks))


def _log_axis(low: float, high: float, start: float, end: float, write: Callable[[float], str]) -> Axis:
    low, high = low / 1.35, high * 1.35
    decades = math.log10(high / low)
    digits = (1,) if decades > 2.5 else (1, 3) if decades > 1.3 else (1, 2, 5) if decades > 0.7 else range(1, 10)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [digit * 10.0**power for power in powers for digit in digits]
    ticks = [(value, write(value)) for value in values if low <= value <= high]
    return Axis(low, high, start, end, True, _sparse(ticks))


def _sparse(ticks: list[tuple[float, str]], most: int = 7) -> tuple[tuple[float, str], ...]:
    """Every n-th, so that at most `most` are left; neighbours that read the same are one."""
    kept = ticks[:: max(1, math.ceil(len(ticks) / most))]
    return tuple(tick for i, tick in enumerate(kept) if i == 0 or tick[1] != kept[i - 1][1])


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= rough * 0.999)


@dataclass(frozen=True)
class Box:
    """A rectangle that something takes up."""

    x: float
    y: float
    width: float
    height: float

    def meets(self, other: Box) -> bool:
        return (
            self.x < other.x + other.width
            and other.x < self.x + self.width
            and self.y < other.y + other.height
            and other.y < self.y + self.height
        )

    def inside(self, other: Box) -> bool:
        return (
            self.x >= other.x
            and self.y >= other.y
            and self.x + self.width <= other.x + other.width
            and self.y + self.height <= other.y + other.height
        )


def place(content: str, x: float, y: float, frame: Box, taken: list[Box]) -> Markup | None:
    """A label beside the point (x, y) that meets nothing in `taken` and stays in `frame`, or None where there is no room.

    What it takes up is added to `taken`.
    """
    width, height = len(content) * LETTER, 13.0
    tries = [
        ("start", x + 9, y - 8),
        ("end", x - 9, y - 8),
        ("start", x + 9, y + 15),
        ("end", x - 9, y + 15),
        ("middle", x, y - 22),
        ("middle", x, y + 28),
    ]
    for anchor, tx, ty in tries:
        left = tx - {"start": 0, "middle": width / 2, "end": width}[anchor]
        box = Box(left, ty - 10, width, height)
        if box.inside(frame) and not any(box.meets(other) for other in taken):
            taken.append(box)
            return text(tx, ty, content, anchor, "label")
    return None
