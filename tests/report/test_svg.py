"""Plots are well-formed, stay in their frame, and keep their labels apart, whatever the values."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from flyweight.report.charts import Bar, Curve, Dot, Scale, bars, curves, dots, scatter, stacks
from flyweight.report.svg import LETTER, WIDTH, Box, axis, fit, node, place

SCALE = Scale("name", "{:.3g}".format)
VALUES = st.floats(1e-9, 1e15, allow_nan=False)


def shapes(drawing: Markup | None) -> ElementTree.Element:
    assert drawing is not None
    return ElementTree.fromstring(str(drawing))


def check_inside(drawing: Markup | None, slack: float = 2.0) -> None:
    """Every coordinate lies in the view box."""
    tree = shapes(drawing)
    height = float(tree.attrib["viewBox"].split()[3])
    for element in tree.iter():
        for name in ("x", "x1", "x2", "cx"):
            if name in element.attrib:
                assert -slack <= float(element.attrib[name]) <= WIDTH + slack, element.attrib
        for name in ("y", "y1", "y2", "cy"):
            if name in element.attrib:
                assert -slack <= float(element.attrib[name]) <= height + slack, element.attrib


def test_text_and_attributes_are_escaped() -> None:
    drawn = node("text", "<b>&", class_='"><script>')
    assert "<b>" not in drawn
    assert "<script>" not in drawn
    assert ElementTree.fromstring(str(drawn)).text == "<b>&"


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=8), st.booleans())
def test_axes_hold_their_values_and_ticks(values: list[float], log: bool) -> None:
    made = axis(values, 0, 100, "{:.3g}".format, log)
    assert made.low < min(values)
    assert made.high > max(values)
    assert len(made.ticks) <= 7
    assert all(made.low <= value <= made.high for value, _ in made.ticks)
    places = [made.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)


def test_ticks_are_round() -> None:
    assert [v for v, _ in axis([0, 10], 0, 1, str).ticks] == [0, 5, 10]
    assert [round(v) for v, _ in axis([1, 1000], 0, 1, str, log=True).ticks] == [1, 10, 100, 1000]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6))
def test_scatter_holds_any_values(points: list[tuple[float, float]]) -> None:
    models = [
        Dot(f"model {i} with a name", i, (x, x * 0.9, x * 1.1), (y, None, y * 1.2)) for i, (x, y) in enumerate(points)
    ]
    check_inside(scatter("t", models, SCALE, SCALE))


@settings(max_examples=40, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=6))
def test_the_others_hold_any_values(values: list[float]) -> None:
    items = [Bar("a very long name that has no room", i, v, f"{v:.3g}", v * 0.5, v * 2) for i, v in enumerate(values)]
    check_inside(bars("t", [("g", items)]))
    check_inside(dots("t", items, SCALE))
    check_inside(stacks("t", [("row", items)]))
    check_inside(curves("t", [Curve("c", 0, list(enumerate(values)))], SCALE, SCALE))


def test_nothing_to_show_gives_no_drawing() -> None:
    assert scatter("t", [], SCALE, SCALE) is None
    assert bars("t", [("g", [])]) is None
    assert dots("t", [], SCALE) is None
    assert stacks("t", [("row", [])]) is None
    assert stacks("t", [("row", [Bar("a", 0, 0.0, "0")])]) is None
    assert curves("t", [Curve("c", 0, [])], SCALE, SCALE) is None


def test_bars_are_as_long_as_their_values() -> None:
    tree = shapes(bars("t", [("", [Bar("a", 0, 10, "10"), Bar("b", 1, 5, "5")])]))
    long, half = (float(e.attrib["width"]) for e in tree.iter("rect"))
    assert half == pytest.approx(long / 2, abs=0.1)


def test_labels_keep_apart_or_stay_away() -> None:
    frame, taken = Box(0, 0, 400, 200), []  # type: ignore[var-annotated]
    placed = [place("a name of some length", 200, 100, frame, taken) for _ in range(12)]
    assert placed[0] is not None
    assert placed[-1] is None
    assert len(taken) == sum(one is not None for one in placed)
    assert not any(a.meets(b) for a, b in itertools.combinations(taken, 2))
    assert all(box.inside(frame) for box in taken)


def test_long_names_are_cut() -> None:
    assert fit("short", 100) == "short"
    cut = fit("x" * 100, 20 * LETTER)
    assert len(cut) == 20
    assert cut.endswith("…")


def test_a_screen_reader_gets_the_numbers() -> None:
    tree = shapes(bars("Latency", [("1x32", [Bar("result", 0, 1.5, "1.50 ms")])]))
    assert tree.attrib["role"] == "img"
    assert tree.attrib["aria-label"] == "Latency. 1x32: result 1.50 ms"
