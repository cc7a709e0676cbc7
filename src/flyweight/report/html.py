"""The report: one HTML file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from flyweight.artifact import Manifest, Measurement
from flyweight.report import plots
from flyweight.report.card import limits, machine_line, settings_line, step_time, what
from flyweight.report.figures import change, interval, label, model_name, number, ordered, show
from flyweight.report.layers import layer_tables

__all__ = ["html"]

OWN_PAGES = ("README.md", "report.html")  # they tell of themselves: their own size and hash cannot stand in them
NAMED = "result"
LEAST = 0.005  # of the time of a run: kernels below it are not listed


def html(manifest: Manifest, recipe_yaml: str | None = None, samples: Sequence[Sequence[str]] | None = None) -> str:
    """The whole page. Everything from the manifest, the recipe and the samples is escaped.

    samples: rows of the user's data (text, label, the reference's answer, the result's), only where they were asked for
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flyweight", "report"), undefined=jinja2.StrictUndefined, autoescape=True
    )
    figures = manifest.measurements
    return environment.get_template("report.html").render(
        title=f"{manifest.family} for {manifest.task}",
        what=what(manifest).replace("`", ""),
        manifest=manifest,
        columns=[model_name(name) for name in plots.names(figures)],
        tiles=tiles(figures),
        plots=plots.sections(manifest),
        legend=[(number, model_name(name)) for number, name in enumerate(plots.names(figures))],
        steps=steps(manifest),
        layer_tables=layer_tables(manifest),
        rows=rows(figures),
        kernels=kernels(manifest),
        limits=limits(manifest),
        machine=machine_line(manifest.environment),
        environment=[facts(key, value) for key, value in manifest.environment.items()],
        versions=manifest.versions,
        recipe=recipe_yaml,
        samples=samples,
        files=[(name, number(entry.bytes, "B"), entry.sha256) for name, entry in manifest.files.items() if name not in OWN_PAGES],
    )  # fmt: skip


def kernels(manifest: Manifest) -> list[dict[str, Any]]:
    """By engine: sentences, kernels by their share of the time, and what every linear ran in with the bits it is stored in."""

    def stored(name: str) -> str:
        return str(manifest.quantized[name].bits) if name in manifest.quantized else "32"

    return [
        {
            "engine": name,
            "text": report.text,
            "totals": [(t.kernel, t.precision, t.nodes, f"{t.share:.1%}") for t in report.totals if t.share >= LEAST],
            "linears": [(n, stored(n), r.kernel, r.precision, f"{r.share:.1%}") for n, r in report.linears.items()],
        }
        for name, report in manifest.kernels.items()
    ]


def tiles(figures: Mapping[str, Mapping[str, Measurement]]) -> list[dict[str, str]]:
    """The few figures that matter most, each with what changed against every reference."""
    result = figures.get(NAMED, {})
    wanted = [key for key in ordered(result) if key.startswith("quality.") and not key.endswith(".difference")][:1]
    latency = [key for key in ordered(result) if key.startswith("latency_ms.p50@1x")][-1:]
    throughput = [key for key in ordered(result) if key.startswith("throughput_per_s@")][-1:]
    wanted += [key for key in ("bytes", "peak_memory_bytes") if key in result]
    wanted[2:2] = [*latency, *throughput]
    if "energy_j_per_item" in result:
        wanted.append("energy_j_per_item")
    return [_tile(key, figures) for key in wanted]


def _tile(key: str, figures: Mapping[str, Mapping[str, Measurement]]) -> dict[str, str]:
    result, told = figures[NAMED], []
    paired = result.get(f"{key}.difference")
    if paired is not None:
        told.append(f"{show('.difference', paired)} against the reference ({interval('.difference', paired)})")
    else:
        for name in plots.names(figures)[1:3]:  # a tile has room for two
            if key in figures[name] and (changed := change(key, result[key], figures[name][key])):
                told.append(f"{changed} {'as' if changed == 'same' else 'than'} {model_name(name)}")
    value, _, unit = show(key, result[key]).partition(" ")
    return {
        "label": label(key),
        "value": value,
        "unit": unit,
        "span": interval(key, result[key]),
        "told": "\n".join(told),
    }


def rows(figures: Mapping[str, Mapping[str, Measurement]]) -> list[dict[str, Any]]:
    """Every figure of every model, with intervals, number of samples and method."""
    names = plots.names(figures)
    found = []
    for key in ordered(key for name in names for key in figures[name]):
        here = [figures[name].get(key) for name in names]
        cells = [("-", "") if one is None else (show(key, one), interval(key, one)) for one in here]
        first = next(one for one in here if one is not None)
        count = f" n = {first.n}." if first.n is not None else ""
        found.append({"label": label(key), "key": key, "cells": cells, "method": f"{first.method}.{count}"})
    return found


def steps(manifest: Manifest) -> list[dict[str, Any]]:
    """What each step was told, how long it took, and what it gained and lost."""
    found: list[dict[str, Any]] = []
    before: dict[str, float] = {}
    for place, step in enumerate(manifest.steps, 1):
        after = plots.after(step)
        found.append(
            {
                "place": place,
                "name": step.name,
                "settings": settings_line(step),
                "time": step_time(step),
                "quality": _moved(after, before, "quality", "share"),
                "parameters": _moved(after, before, "nonzero_parameters", "weights"),
                "bytes": _moved(after, before, "bytes", "B"),
                "told": told(step.notes),
            }
        )
        before = after or before
    return found


def _moved(after: Mapping[str, float], before: Mapping[str, float], key: str, unit: str) -> tuple[str, str]:
    """(value after the step, change to before it)."""
    if key not in after:
        return "-", ""
    value = number(after[key], unit)
    if key not in before or not before[key]:
        return value, ""
    if unit == "share":
        return value, number(after[key] - before[key], unit, signed=True)
    share = after[key] / before[key] - 1
    return value, "" if abs(share) < 5e-4 else f"{100 * share:+.1f} %"


def told(notes: Mapping[str, Any]) -> str:
    """One sentence from a step's notes: the best metric, and the control run that had no teacher."""
    said = []
    if isinstance(notes.get("teacher_metric"), int | float):
        said.append(f"teacher {100 * notes['teacher_metric']:.1f} %")
    if isinstance(notes.get("best_metric"), int | float):
        said.append(f"best validation {100 * notes['best_metric']:.1f} %")
    control = notes.get("control")
    if isinstance(control, Mapping) and isinstance(control.get("best_metric"), int | float):
        said.append(f"control without the teacher {100 * control['best_metric']:.1f} %")
    if isinstance(notes.get("bits_per_weight"), int | float):
        said.append(f"{notes['bits_per_weight']:.2f} bits a weight, scales included")
    if isinstance(notes.get("peak_memory_bytes"), int):
        said.append(f"at most {number(notes['peak_memory_bytes'], 'B')} of memory")
    return ", ".join(said)


def facts(key: str, value: Any) -> tuple[str, str]:
    """A row of the machine's list."""
    if key.endswith("_bytes") and isinstance(value, int):
        return key.removesuffix("_bytes").replace("_", " "), number(value, "B")
    return key.replace("_", " "), plain(value)


def plain(value: Any) -> str:
    """JSON as a person writes it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(one)}" for key, one in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(one) for one in value) or "none known"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
