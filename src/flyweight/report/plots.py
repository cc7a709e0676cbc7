"""Which plots the report shows, made from the manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup

from flyweight.artifact import Manifest, Measurement, StepRecord
from flyweight.measure.size import PARTS
from flyweight.report.charts import Bar, Curve, Dot, Scale, bars, curves, dots, scatter, stacks
from flyweight.report.figures import model_name, number, ordered
from flyweight.report.svg import LETTER

__all__ = ["Section", "after", "names", "sections"]

Figures = Mapping[str, Mapping[str, Measurement]]
PERCENT = "{:.1%}".format


class Section(NamedTuple):
    """drawings: [(caption, SVG)]; empty: what is said instead where there are none; legend: "models", "parts" or none."""

    title: str
    drawings: list[tuple[str, Markup]]
    empty: str
    legend: list[tuple[str, str]]  # (class, name)


def names(figures: Figures) -> list[str]:
    """The result first; colours follow this order."""
    return [*(["result"] if "result" in figures else []), *(name for name in figures if name != "result")]


def sections(manifest: Manifest) -> list[Section]:
    figures = manifest.measurements
    models = [(f"c{i % 6} m{i % 4}", model_name(name)) for i, name in enumerate(names(figures))]
    present = {part for one in figures.values() for part in PARTS if f"bytes.{part}" in one}
    parts = [(f"p{i % 6}", part) for i, part in enumerate(PARTS) if part in present]
    controls = any(_of(step.notes.get("control"), "history") for step in manifest.steps)
    run = [("c0 m0", "the step"), ("c1 m1", "control: the same student without the teacher")] if controls else []
    return [
        _section("Quality against size and latency", tradeoffs(figures), "Quality was not measured.", models),
        _section("Latency", latencies(figures), "Latency was not measured.", models),
        _section("What the bytes are made of", made_of(figures), "Bytes by part are not known.", parts),
        _section("What each step gained and lost", gains(manifest), "Nothing is known of the steps.", []),
        _section("Training", training(manifest), "No step was trained.", run),
    ]


def _section(title: str, drawn: list[tuple[str, Markup | None]], empty: str, legend: list[tuple[str, str]]) -> Section:
    drawings = [(caption, drawing) for caption, drawing in drawn if drawing is not None]
    return Section(title, drawings, empty, legend if drawings else [])


def _span(figure: Measurement) -> tuple[float, float | None, float | None]:
    return figure.value, figure.low, figure.high


def tradeoffs(figures: Figures) -> list[tuple[str, Markup | None]]:
    """The main metric against bytes and against the latency of one item of the longest length."""
    keys = [key for name in names(figures) for key in figures[name]]
    metric = next((k for k in ordered(keys) if re.fullmatch(r"quality\.[^.]+", k)), None)
    if metric is None:
        return []
    said = metric.removeprefix("quality.").replace("_", " ")
    latency = [key for key in ordered(keys) if key.startswith("latency_ms.p50@1x")][-1:]
    found = []
    for key in ["bytes", *latency]:
        dots = [
            Dot(model_name(name), kind, _span(figures[name][key]), _span(figures[name][metric]))
            for kind, name in enumerate(names(figures))
            if key in figures[name] and metric in figures[name]
        ]
        unit, axis = ("B", "size on disk") if key == "bytes" else ("ms", f"median latency at {key.partition('@')[2]}")
        found.append(
            (
                f"{said} against {axis}",
                scatter(f"{said} against {axis}", dots, _scale(axis, unit), Scale(said, PERCENT)),
            )
        )
    return found


def _scale(name: str, unit: str) -> Scale:
    return Scale(name, lambda value: _tick(number(value, unit)))


def _tick(written: str) -> str:
    """`20.0 MB` -> `20 MB`."""
    return re.sub(r"(\.\d*?)0+(?=\D|$)", lambda found: found[1] if found[1] != "." else "", written)


def latencies(figures: Figures) -> list[tuple[str, Markup | None]]:
    """A group of bars for every batch and length, each on its own scale."""
    keys = [key for name in names(figures) for key in figures[name] if key.startswith("latency_ms.p50@")]
    groups = []
    for key in ordered(keys):
        items = []
        for kind, name in enumerate(names(figures)):
            if (figure := figures[name].get(key)) is not None:
                written = number(figure.value, figure.unit)
                items.append(Bar(model_name(name), kind, figure.value, written, figure.low, figure.high))
        batch, length = key.partition("@")[2].split("x")
        groups.append((f"{batch} x {length} tokens", items))
    half = (len(groups) + 1) // 2
    room = 14 + LETTER * max((len(bar.name) for _, items in groups for bar in items), default=0)
    caption = "median of a call; each group has its own scale"
    split = [groups[:half], groups[half:]]
    return [(caption, bars("Median latency", some, min(room, 150.0))) for some in split]


def made_of(figures: Figures) -> list[tuple[str, Markup | None]]:
    """One bar a set of weights: the references hold the same ones and share theirs."""
    shared: dict[tuple[float, ...], list[str]] = {}
    rows: dict[tuple[float, ...], list[Bar]] = {}
    for name in names(figures):
        known = [(kind, part, figures[name].get(f"bytes.{part}")) for kind, part in enumerate(PARTS)]
        parts = [Bar(part, k, one.value, number(one.value, "B")) for k, part, one in known if one is not None]
        sizes = tuple(part.value for part in parts)
        shared.setdefault(sizes, []).append(model_name(name))
        rows[sizes] = parts
    stacked = [(f"{', '.join(shared[sizes])}: {number(sum(sizes), 'B')}", parts) for sizes, parts in rows.items()]
    return [("weights as stored, packed", stacks("Bytes by part", stacked))]


def after(step: StepRecord) -> dict[str, float]:
    """The numbers a step left in its notes under `after`."""
    noted = step.notes.get("after")
    return (
        {key: float(value) for key, value in noted.items() if _is_number(value)} if isinstance(noted, Mapping) else {}
    )


def gains(manifest: Manifest) -> list[tuple[str, Markup | None]]:
    """What the weights take and what they are worth, step by step."""
    room = min(150.0, 14 + LETTER * max((len(step.name) + 3 for step in manifest.steps), default=0))

    def items(key: str, unit: str) -> list[Bar]:
        numbered = [(f"{place} {step.name}", after(step)) for place, step in enumerate(manifest.steps, 1)]
        return [Bar(name, 0, left[key], number(left[key], unit)) for name, left in numbered if key in left]

    size, worth = "Bytes of the weights after each step", "Validation metric after each step"
    return [
        (f"{size}, before export", bars(size, [("", items("bytes", "B"))], room)),
        (f"{worth}; the axis does not begin at zero", dots(worth, items("quality", "share"), Scale("", PERCENT), room)),
    ]


def training(manifest: Manifest) -> list[tuple[str, Markup | None]]:
    """Loss and metric of every step that was trained, the control run beside it."""
    found: list[tuple[str, Markup | None]] = []
    for place, step in enumerate(manifest.steps, 1):
        histories = {"step": step.notes.get("history"), "control": _of(step.notes.get("control"), "history")}
        for key, write in (("loss", "{:.3g}".format), ("metric", PERCENT)):
            lines = [Curve(name, kind, _points(history, key)) for kind, (name, history) in enumerate(histories.items())]
            title = f"{place} {step.name}: {'mean loss' if key == 'loss' else 'validation metric'}"
            scale = Scale("optimizer steps", "{:g}".format)
            found.append((title, curves(title, lines, scale, Scale(key, write))))
    return found


def _points(history: Any, key: str) -> list[tuple[float, float]]:
    rows = [row for row in history if isinstance(row, Mapping)] if isinstance(history, list) else []
    return [
        (float(row["step"]), float(row[key]))
        for row in rows
        if _is_number(row.get("step")) and _is_number(row.get(key))
    ]


def _of(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) != float("inf")
    )
