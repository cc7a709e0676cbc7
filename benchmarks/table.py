"""Results -> Markdown: the plain page of a table, and the cells of all. A figure that was not taken is a dash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.command import BESIDE
from benchmarks.quality import METRIC, paired
from benchmarks.runner import Row, Table, failure, load, unpack_scores
from flyweight.artifact import Measurement

COLUMNS = (
    "",
    "MB",
    "accuracy",
    "difference, points",
    "ms at 1x128",
    "speed-up at 1x128",
    "items/s at 32x128",
    "speed-up at 32x128",
)
DASH = "–"
MARK = "\\*"
STAR = f"{MARK} while other processes used the machine, so that it took longer; how much they did stands in the row's JSON."

Figures = Mapping[str, Mapping[str, Any]]


def markdown(table: Table) -> str:
    """The whole page: title, what it shows, the rows, machine and command."""
    found = {row.name: record for row in table.rows if (record := load(table.name, row.name)) is not None}
    times = found.get("latency", {}).get("figures", {})
    lines = [f"# {table.title}", "", table.about, "", line(COLUMNS), line(["---", *["--:"] * (len(COLUMNS) - 1)])]
    for row in table.rows:
        if row.name == "latency":
            continue
        record = found.get(row.name)
        cells = _cells(table, record, found, times) if record else [DASH] * (len(COLUMNS) - 1)
        lines.append(line([row.summary if record else f"{row.summary} ({absent(table, row.name)})", *cells]))
    return "\n".join([*lines, "", *footer(table, found)]) + "\n"


def absent(table: Table, row: str) -> str:
    """Why there is no figure."""
    why = failure(table.name, row)
    return "not run" if why is None else f"failed: {why}"


def _cells(table: Table, record: Mapping[str, Any], found: Mapping[str, Any], times: Figures) -> list[str]:
    name, figures = record["row"], record["figures"]
    size = figures.get("bytes")
    return [
        f"{size['value'] / 1e6:.1f}" if size else DASH,
        interval(figures.get(METRIC), "{:.1f}", 100),
        DASH if name == table.reference else _difference(table, record, found),
        interval(times.get(f"{name}:latency_ms.p50@1x128"), "{:.3g}"),
        interval(times.get(f"{name}:speedup@1x128"), "{:.2f}"),
        interval(times.get(f"{name}:throughput_per_s@32x128"), "{:.0f}"),
        interval(times.get(f"{name}:speedup@32x128"), "{:.2f}"),
    ]


def _difference(table: Table, record: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    reference = found.get(table.reference)
    if reference is None or record["scores"] is None or reference["scores"] is None:
        return DASH
    value = paired(unpack_scores(record["scores"]), unpack_scores(reference["scores"]), table.reference)
    return interval(value.model_dump(), "{:+.1f}", 100)


def interval(figure: Mapping[str, Any] | None, form: str, scale: float = 1.0) -> str:
    """`84.1 [82.4, 85.7]`."""
    if figure is None:
        return DASH
    text = form.format(figure["value"] * scale)
    if figure.get("low") is None or figure.get("high") is None:
        return text
    return f"{text} [{form.format(figure['low'] * scale)}, {form.format(figure['high'] * scale)}]"


def line(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def head(columns: Sequence[str], left: int = 1) -> list[str]:
    return [line(columns), line(["---"] * left + ["--:"] * (len(columns) - left))]


def show(figure: Measurement | None, form: str, scale: float = 1.0, bounds: bool = True) -> str:
    if figure is None:
        return DASH
    return interval(figure.model_dump(exclude=None if bounds else {"low", "high"}), form, scale)


def seconds(figure_of: Callable[[str, str], Measurement | None], row: str, verb: str) -> str:
    """`48 (21, 30)`: the whole command, the step in it, and what the step was expected to take; a star where the machine was
    in use by others. figure_of: gives (row, key)'s figure."""
    figures = [figure_of(row, f"{verb}.{key}") for key in ("seconds", "step_seconds", "estimated_seconds")]
    whole, *rest = [DASH if figure is None else f"{figure.value:.0f}" for figure in figures]
    return DASH if whole == DASH else f"{whole}{star(*figures)} ({', '.join(rest)})"


def star(*figures: Measurement | None) -> str:
    """A mark where one of them was taken while others used the machine."""
    return MARK * any(BESIDE in figure.method for figure in figures if figure is not None)


def starred(parts: Sequence[str]) -> list[str]:
    """What the stars mean, where there are any."""
    return [STAR, ""] if any(MARK in part for part in parts) else []


def called(table: Table, row: Row) -> str:
    """The row, and a word where it gave nothing; why stands below."""
    if load(table.name, row.name) is not None:
        return row.summary
    return f"{row.summary} ({'failed' if failure(table.name, row.name) else 'not run'})"


def what_failed(table: Table, found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    failed = [(row.name, why) for row in table.rows if (why := failure(table.name, row.name)) is not None]
    notes = [note for record in found.values() for note in record.get("notes", ())]
    if failed or notes:
        yield from ("### What failed", "")
        yield from (f"- `{name}`: {why}" for name, why in failed)
        yield from (f"- {note}" for note in notes)
        yield ""


def footer(table: Table, found: Mapping[str, Any]) -> list[str]:
    if not found:
        return ["No row has been run yet."]
    machines = {(r["machine"]["cpu"], r["machine"]["cores"], r["machine"]["system"]) for r in found.values()}
    packages: dict[str, set[str]] = {}
    for record in found.values():
        for package, version in record["versions"].items():
            packages.setdefault(package, set()).add(version)
    seeds = sorted({record["seed"] for record in found.values()})
    return [
        f"Command: `make bench TABLE={table.name}`; seed {', '.join(map(str, seeds))}.",
        "Machine: " + "; ".join(f"{cpu}, {cores} cores, {system}" for cpu, cores, system in sorted(machines)) + ".",
        "Versions: " + ", ".join(f"{p} {'/'.join(sorted(v))}" for p, v in sorted(packages.items())) + ".",
    ]
