"""Lines of a table of aims: `met`, `not met`, or a dash where a row that they need gave nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.found import Found
from benchmarks.table import DASH, interval, star
from flyweight.artifact import Measurement


class Line(NamedTuple):
    """One line of the table of aims."""

    what: str
    aim: str
    figure: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return DASH if self.met is None else "met" if self.met else "**not met**"


def at_least(found: Found, row: str, key: str, aim: float, what: str, form: str = "{:.2f}") -> Line:
    return judged(found.figure(row, key), what, f">= {aim:g}", form, 1.0, lambda value: value >= aim)


def at_most(found: Found, row: str, key: str, aim: float, what: str, form: str = "{:.2f}", scale: float = 1.0) -> Line:
    return judged(found.figure(row, key), what, f"<= {aim:g}", form, scale, lambda value: value * scale <= aim)


def judged(
    figure: Measurement | None, what: str, aim: str, form: str, scale: float, holds: Callable[[float], bool]
) -> Line:
    """By the value itself."""
    text = interval(None if figure is None else figure.model_dump(), form, scale) + star(figure)
    return Line(what, aim, text, None if figure is None else holds(figure.value))


def surely(
    figure: Measurement | None, what: str, aim: str, holds: Callable[[float], bool], form: str, scale: float = 1.0
) -> Line:
    """By the lower bound of its 95 % interval."""
    text = interval(None if figure is None else figure.model_dump(), form, scale)
    return Line(what, aim, text, None if figure is None or figure.low is None else holds(scale * figure.low))
