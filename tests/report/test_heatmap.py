"""The page with heat maps: one file that fetches nothing, with every number on hover and in a table."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from flyweight.measure.harm import Harm, Part, Span, signed
from flyweight.report.heatmap import heat_page, heatmap, maps

VOID = {"meta", "br"}
EVIL = '<script>alert("x")</script>&'


def span(value: float, width: float = 0.01) -> Span:
    return Span(value=value, low=value - width, high=value + width)


def part(kind: Any, block: int, cost: Span, stack: str = "encoder", **other: Any) -> Part:
    return Part(kind=kind, stack=stack, block=block, weights=1234, cost=cost, change=span(-0.05), **other)


def harm(**changes: Any) -> Harm:
    """Two blocks; of the second head 1 went before."""
    parts = [
        part("head", 0, span(0.40), attention=0, number=0, head=0),
        part("head", 0, span(0.001), attention=0, number=1, head=1),
        part("head", 0, span(-0.10), attention=0, number=2, head=2),
        part("head", 1, span(0.10), attention=0, number=0, head=0),
        part("head", 1, span(0.025), attention=0, number=1, head=2),
        *(part("attention", block, span(0.5), attention=0) for block in range(2)),
        *(part("neurons", block, span(0.2 - 0.1 * n), number=n, neurons=(n,)) for block in range(2) for n in range(2)),
        *(part("feed-forward", block, span(0.6)) for block in range(2)),
        *(part("layer", block, span(2.5 * (block + 1))) for block in range(2)),
    ]
    values: dict[str, Any] = {"task": "text-classification", "cost": "rise of the loss", "metric": "accuracy",
                              "whole": {"loss": 0.25, "accuracy": 0.9}, "examples": 64, "tokens": 12345, "groups": 2,
                              "expected": 1.0, "seconds": 2.0, "parts": tuple(parts)}  # fmt: skip
    return Harm(**{**values, **changes})


class Checker(HTMLParser):
    """Tags close in order; collects what would be fetched, and the text of titles and cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_the_page_is_whole_and_fetches_nothing() -> None:
    page = heat_page(harm(), "mine")
    found = checked(page)
    assert found.fetched == []
    assert "script" not in found.tags
    assert not re.search(r"https?://|url\(|@import", page)
    assert found.tags.count("svg") == 3
    assert page == heat_page(harm(), "mine")
    assert "loss 0.2500, accuracy 90.0 %" in page
    assert "64 examples (12,345 tokens)" in page


def test_every_number_is_on_hover_and_in_a_table() -> None:
    found = checked(heat_page(harm(), "mine"))
    for one in harm().parts:
        change = f"{100 * (one.change.value if one.change else 0):+.1f} points"
        low, high = signed(one.cost.low), signed(one.cost.high)
        assert f"{one.name}: {signed(one.cost.value)} ({low} to {high}); {change}" in found.texts["title"]
        assert one.name in found.texts["th"]
        assert signed(one.cost.value) in found.texts["td"]
        assert f"{low} to {high}" in found.texts["td"]


def test_the_drawings_say_in_words_what_they_show() -> None:
    page = heat_page(harm(), "mine")
    assert "Costs most: encoder 0, head 0: +0.4000" in page
    assert "Costs least: encoder 0, head 2: -0.1000" in page
    assert page.count('role="img"') == 3


def test_shades_and_marks() -> None:
    """Root of the share of the largest; below zero another colour; struck through where the interval holds zero."""
    heads, groups, whole = maps(harm())
    assert (len(heads.cells), heads.rows, heads.columns) == (5, ["0", "1"], ["0", "1", "2"])
    assert (1, 1) not in heads.cells, "a head that went before has no cell"
    assert (len(groups.cells), len(whole.cells)) == (4, 6)
    assert whole.columns == ["attention", "feed-forward", "whole layer"]
    cells = re.findall(r'<g class="cell"><title>(.*?)</title>(.*?)</g>', heatmap(heads, "rise of the loss"))
    shown = {
        name.partition(":")[0]: (*re.findall(r'class="(\w+)" fill-opacity="([\d.]+)"', inside)[0], "strike" in inside)
        for name, inside in cells
    }
    assert shown["encoder 0, head 0"] == ("harm", "1.000", False)
    assert shown["encoder 1, head 0"] == ("harm", "0.500", False)  # root of a quarter
    assert shown["encoder 1, head 2"] == ("harm", "0.250", False)
    assert shown["encoder 0, head 1"] == ("harm", "0.050", True)
    assert shown["encoder 0, head 2"] == ("help", "0.500", False)


def test_rows_are_blocks_and_columns_are_units() -> None:
    heads = maps(harm())[0]
    drawn = heatmap(heads, "rise of the loss")
    corner = {}
    for name, x, y in re.findall(r'<title>([^<:]*):[^<]*</title><rect class="ground" x="([\d.]+)" y="([\d.]+)"', drawn):
        corner[name] = (float(x), float(y))
    assert corner["encoder 0, head 0"][1] == corner["encoder 0, head 2"][1] < corner["encoder 1, head 0"][1]
    assert corner["encoder 0, head 0"][0] == corner["encoder 1, head 0"][0] < corner["encoder 0, head 2"][0]
    assert corner["encoder 1, head 2"][0] == corner["encoder 0, head 2"][0]


def test_a_map_for_each_attention_of_each_stack() -> None:
    two = harm().model_copy(
        update={
            "parts": (
                *harm().parts,
                part("head", 0, span(0.1), "decoder", attention=0, number=0, head=0),
                part("head", 0, span(0.3), "decoder", attention=1, number=0, head=0),
                part("attention", 0, span(0.3), "decoder", attention=0),
                part("attention", 0, span(0.3), "decoder", attention=1),
                part("layer", 0, span(0.3), "decoder"),
            )
        }
    )
    titles = [one.title for one in maps(two) if one.cells]
    assert titles[3:] == ["decoder: heads", "decoder: heads of its cross-attention", "decoder: whole parts"]
    assert maps(two)[-1].columns == ["attention", "cross-attention", "whole layer"]
    checked(heat_page(two, "mine"))


@pytest.mark.parametrize(("heads", "blocks"), [(64, 2), (1, 60)])
def test_many_units_fit(heads: int, blocks: int) -> None:
    many = [
        part("head", block, span(0.1 * number), attention=0, number=number, head=number)
        for block in range(blocks)
        for number in range(heads)
    ]
    page = heat_page(harm(parts=tuple(many)), "mine")
    checked(page)
    for x, width in re.findall(r'class="ground" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', page):
        assert float(x) + float(width) <= 420.2
        assert float(width) > 0


def test_nothing_that_costs_and_nothing_to_compare() -> None:
    """All zero: nothing is divided by it. Without labels there is no second column."""
    still = tuple(one.model_copy(update={"cost": span(0, 0), "change": None}) for one in harm().parts)
    page = heat_page(harm(parts=still, cost="1 - cosine", metric=None, whole={}), "mine")
    found = checked(page)
    assert "accuracy" not in page
    assert "nan" not in page.lower().replace("finance", "")
    assert found.tags.count("svg") == 3


def test_names_are_escaped() -> None:
    page = heat_page(harm(), EVIL)
    assert "script" not in checked(page).tags
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("value", "told"), [(0.0, "0"), (0.12346, "+0.1235"), (-2.0, "-2.0000"), (-4e-5, "-4.0e-05"), (0.001, "+0.0010")]
)
def test_costs_are_written_so_that_small_ones_show(value: float, told: str) -> None:
    assert signed(value) == told


def test_extremes_share_nothing() -> None:
    worst, best = harm().extremes("head", 10)
    assert [one.name for one in worst] == ["encoder 0, head 0", "encoder 1, head 0", "encoder 1, head 2"]
    assert [one.name for one in best] == ["encoder 0, head 2", "encoder 0, head 1"]
    worst, best = harm().extremes("head", 1)
    assert (worst[0].cost.value, best[0].cost.value) == (0.40, -0.10)
    assert harm(parts=()).extremes("head", 3) == ([], [])
