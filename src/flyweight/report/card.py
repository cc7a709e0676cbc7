"""The model card, README.md of an artifact."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from flyweight.artifact import Manifest, Measurement, StepRecord
from flyweight.report.figures import interval, label, model_name, number, ordered, show
from flyweight.report.layers import fallbacks

__all__ = ["card", "machine_line", "settings_line", "step_time", "time_text"]

PIPELINES = {"text-classification": "text-classification", "embedding": "feature-extraction"}
LEFT_OUT = (".p90@", ".p99@", "bytes.")


def card(manifest: Manifest, samples: bool = False) -> str:
    """Markdown with a YAML head as model hubs read it. samples: the report beside it shows rows of the user's data."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flyweight", "report"), undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    figures = manifest.measurements
    columns = ["result", *(name for name in figures if name != "result")] if "result" in figures else []
    return environment.get_template("card.md").render(
        title=f"{manifest.family} for {manifest.task}, compressed",
        pipeline=PIPELINES.get(manifest.task, manifest.task),
        tags=tags(manifest),
        what=_one_line(what(manifest)),
        verdict=_one_line(manifest.verdict.text) if manifest.verdict else None,
        columns=[_cell(model_name(name)) for name in columns],
        rows=rows(figures, columns),
        machine=_one_line(machine_line(manifest.environment)),
        steps=[
            {
                "name": _one_line(step.name),
                "time": step_time(step),
                "settings": _code(settings_line(step)),
                "told": [_one_line(line) for line in fallbacks(step)],
            }
            for step in manifest.steps
        ],
        engine=manifest.engines.get("onnxruntime"),
        pad=manifest.pad_token_id,
        max_length=manifest.max_length,
        labels=json.dumps(manifest.labels, ensure_ascii=False) if manifest.labels else None,
        label_list=", ".join(_code(name) for name in manifest.labels or ()),
        kernels=[_one_line(line) for report in manifest.kernels.values() for line in report.text],
        limits=limits(manifest),
        origin=manifest.origin,
        samples=samples,
    )


def what(manifest: Manifest) -> str:
    """One paragraph: what came out of what."""
    names = [step.name for step in manifest.steps]
    made = f"by {', '.join(names)}" if names else "without any step"
    blocks = [f"{len(stack)} {name} blocks" for name, stack in manifest.blocks.items()]
    shape = f" It has {' and '.join(blocks)}." if blocks else ""
    packed = bool(manifest.quantized or manifest.sparse)
    own = (
        "Its weights are packed in Flyweight's own layout"
        if packed
        else "Its blocks have shapes that no config can say"
    )
    plain = "The folder is plain Hugging Face: `AutoModel` loads it."
    if manifest.layout == "pack-quantized":
        plain = (
            "Its weights are packed as `compressed-tensors` has them (pack-quantized): with that package installed "
            "`AutoModel` loads the folder."
        )
    if not manifest.plain:
        plain = f"{own}; `flyweight` or the engine's file loads it, `AutoModel` does not."
    return (
        f"A {manifest.family} model for {manifest.task}, made {made} with Flyweight {manifest.flyweight} "
        f"(seed {manifest.seed}).{shape} {plain}"
    )


def tags(manifest: Manifest) -> list[str]:
    found = ["flyweight", *(name for name in manifest.engines)]
    found += sorted({f"int{info.bits}" for info in manifest.quantized.values()})
    return [*found, *(["pruned"] if manifest.sparse or any(s.name == "prune" for s in manifest.steps) else [])]


def rows(figures: Mapping[str, Mapping[str, Measurement]], columns: list[str]) -> list[list[str]]:
    """One row a figure of the result; each cell with its interval."""

    def cell(key: str, figure: Measurement | None) -> str:
        if figure is None:
            return "-"
        span = interval(key, figure)
        return show(key, figure) + (f" ({span})" if span else "")

    keys = [key for key in ordered(figures.get("result", {})) if not any(part in key for part in LEFT_OUT)]
    return [[_cell(label(key)), *(_cell(cell(key, figures[name].get(key))) for name in columns)] for key in keys]


def limits(manifest: Manifest) -> list[str]:
    found = []
    if manifest.activations == "dynamic" and manifest.quantized:
        found.append("Inputs of its linears become int8 batch by batch: an answer depends a little on its neighbours.")
    methods = {figure.method for figures in manifest.measurements.values() for figure in figures.values()}
    if any(method.startswith("estimated") for method in methods):
        found.append("Energy is estimated from CPU time: no counter could be read on that machine.")
    for name, engine in manifest.engines.items():
        found.append(
            f"The {name} file ({engine.precision}) differs from torch by at most {engine.parity:.2g}, relatively."
        )
    return found


def machine_line(environment: Mapping[str, Any]) -> str:
    """`CPU, 2 cores, 24.8 GB, Linux ..., Python ...; flags; versions`; empty where nothing is known."""
    if not environment:
        return ""
    memory = environment.get("memory_bytes")
    parts = [
        str(environment.get("cpu", "")),
        f"{environment['cores']} cores" if "cores" in environment else "",
        number(float(memory), "B") if memory else "",
        str(environment.get("system", "")),
        f"Python {environment['python']}" if "python" in environment else "",
        *(f"{name} {version}" for name, version in dict(environment.get("versions", {})).items()),
    ]
    return ", ".join(part for part in parts if part)


def settings_line(step: StepRecord) -> str:
    """`epochs 3, learning_rate 5e-05, ...`; what is not set is left out."""
    return ", ".join(
        f"{key} {_plain(value)}" for key, value in step.settings.items() if value not in (None, [], (), "")
    )


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    if isinstance(value, str) and Path(value).is_absolute():
        return Path(value).name  # where it stands on the maker's machine is nobody's business
    return f"{value:g}" if isinstance(value, float) else str(value)


def step_time(step: StepRecord) -> str:
    """A step that was stopped and went on tells the time of its last run alone."""
    return time_text(step.seconds) + (" since it went on" if step.notes.get("resumed") else "")


def time_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _one_line(text: str) -> str:
    """Prose: no line breaks, and nothing that Markdown would take for HTML."""
    return html.escape(" ".join(text.split()), quote=False)


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _code(text: str) -> str:
    """Inline code, whatever is in it."""
    text = " ".join(text.split())
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(len(run) for run in re.findall("`+", text)))
    return f"{fence} {text} {fence}"
