"""Layer by layer: what the accuracy gate changed, and which bits a budget gave. From the notes of the steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flyweight.artifact import Manifest, StepRecord
from flyweight.report.figures import number

__all__ = ["LayerTable", "fallbacks", "layer_tables"]


class LayerTable(NamedTuple):
    """told: sentences above it; head, rows: cells"""

    title: str
    told: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def layer_tables(manifest: Manifest) -> list[LayerTable]:
    """One for every gate, one for every mix of bits; a gate at which nothing was tried has no rows."""
    return [table for step in manifest.steps for table in (*_gate(step), *_mix(step))]


def fallbacks(step: StepRecord) -> list[str]:
    """Sentences for the card: what the gate said, and every layer that fell back."""
    gate = step.notes.get("gate")
    if not isinstance(gate, Mapping):
        return []
    changed = _fallen(gate)
    said = [f"Gate on the validation examples: {_told(gate)}"]
    return [*said, *([f"Fallen back: {', '.join(changed)}."] if changed else [])]


def _gate(step: StepRecord) -> Iterator[LayerTable]:
    gate = step.notes.get("gate")
    if not isinstance(gate, Mapping):
        return
    metric = str(gate.get("metric", "metric")).replace("_", " ")
    head = ("layer", "was", "moves its block by", f"{metric} gained in float", "became")
    rows = [
        (
            str(row["layer"]) + (f" and {len(row['linears']) - 1} more" if len(row["linears"]) > 1 else ""),
            str(row["was"]),
            "-" if row.get("output_error") is None else f"{100 * row['output_error'] ** 0.5:.2f} %",
            "-" if row.get("metric_change") is None else number(row["metric_change"], "share", signed=True),
            str(row["became"]),
        )
        for row in _rows(gate)
    ]
    yield LayerTable("Accuracy gate", _told(gate), head, rows)


def _mix(step: StepRecord) -> Iterator[LayerTable]:
    mixed = step.notes.get("mixed")
    if not isinstance(mixed, Mapping):
        return
    first = ", as the acceptance rule came first" if _fallen(step.notes.get("gate")) else ""
    over = f": {mixed['over_budget']:,} bytes more than the budget{first}" if mixed.get("over_budget") else ""
    bits = f"The linears of the blocks take {mixed['bits_per_weight']:.3f} bits a weight, scales included"
    allowed = f"; {mixed['budget']:g} were allowed"
    if "max_megabytes" in mixed:  # what was allowed is told of all weights then
        allowed = f". All weights take {mixed['megabytes']:g} MB; {mixed['max_megabytes']:g} were allowed"
    told = f"{bits}{allowed}{over}. Each alone, rounded to nearest, moves the output of its block by the share told."
    rows = [(str(row["layer"]), str(row["bits"]), f"{100 * row['error'] ** 0.5:.2f} %") for row in _rows(mixed)]
    yield LayerTable("Bits by layer", told, ("layer", "bits", "moves its block by"), rows)


def _fallen(gate: Any) -> list[str]:
    """What the gate changed, `layer to bits` each."""
    rows = _rows(gate) if isinstance(gate, Mapping) else []
    return [f"{row['layer']} to {row['became']}" for row in rows if row.get("became") != "kept"]


def _told(gate: Mapping[str, Any]) -> str:
    return " ".join(str(gate[key]) for key in ("told", "verdict") if gate.get(key))


def _rows(noted: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in noted.get("layers") or () if isinstance(row, Mapping)]
