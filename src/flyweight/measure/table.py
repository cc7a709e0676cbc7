"""A table of times of small models (`flyweight.measure.probes`): what it depends on, its file, and the costs that follow from it.

With t the time of a probe, b blocks deep, and t0 that of the anchor:

    what k units cost more than j   (t[k] - t[j]) / b          between measured k by linear interpolation
    a block of the anchor           (t[deeper] - t0) / (its blocks - b)
    what lies outside of blocks     t0 - b x a block of the anchor

More units are not cheaper and nothing costs less than nothing: where times say so, that is noise, and it is evened out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from flyweight.artifact import read_manifest
from flyweight.errors import StepError
from flyweight.measure.costs import Costs, Kind, kinds_of, most_units
from flyweight.measure.environment import cpu_flags, cpu_model, versions
from flyweight.measure.probes import PANEL, Probe, regular
from flyweight.models import surgery

if TYPE_CHECKING:
    from flyweight.measure.race import Terms
    from flyweight.models.bundle import Bundle

__all__ = ["Row", "Table", "costs_of", "file_name", "key_of", "machine_key", "read_table", "rising"]

FORMAT = 2
SLOW = 0.01
"""A number of neurons counts as slow where it takes surely so much longer than regular ones beside it would."""
ACTIVATIONS = ("hidden_act", "activation", "activation_function", "feed_forward_proj")  # what configs call it


class Row(BaseModel):
    """One probe. kept: (stack, attention or None for neurons, units); ms: median, low and high its 95 % interval"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kept: tuple[tuple[str, int | None, int], ...]
    deep: dict[str, int]
    ms: float = Field(gt=0, allow_inf_nan=False)
    low: float | None = Field(None, gt=0)
    high: float | None = Field(None, gt=0)

    @property
    def probe(self) -> Probe:
        return Probe({Kind(stack, attention): units for stack, attention, units in self.kept}, self.deep)


class Table(BaseModel):
    """key: what the times depend on, as `key_of` gives it; rows: the anchor first; rounds, seconds: what it took"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    key: dict[str, str]
    rows: tuple[Row, ...] = Field(min_length=2)
    rounds: int
    seconds: float

    @property
    def spread(self) -> float:
        """Half of the 95 % interval of a time, as a share of it: the median over rows; infinity where none has an interval."""
        widths = _half_widths(self.rows)
        return float(np.median(widths)) if widths else float("inf")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """Every kind is measured in full, every stack at two depths."""
        anchor = self.rows[0]
        kinds, stacks = set(anchor.probe.kept), {kind.stack for kind in anchor.probe.kept}
        if any(set(row.probe.kept) != kinds or set(row.deep) != stacks for row in self.rows):
            raise ValueError("rows tell of different kinds of units")
        for kind in kinds:
            if max(_single(self, kind)) != max(row.probe.kept[kind] for row in self.rows):
                raise ValueError(f"no row with all {kind} and all else as in the first")
        for stack in stacks:
            if not any(_is_deeper(self, row, stack) for row in self.rows):
                raise ValueError(f"no row with more blocks of the {stack}")
        return self


def key_of(bundle: Bundle, terms: Terms) -> dict[str, str]:
    """Everything that times of blocks depend on, in words that a person can compare."""
    config = bundle.model.config
    found = {"family": bundle.family.model_type, "task": bundle.task}
    shapes = surgery.shapes(bundle.model, bundle.family)
    present, lists = surgery.stacks(bundle.model, bundle.family), surgery.blocks(bundle.model, bundle.family)
    activation = next((str(value) for name in ACTIVATIONS if (value := getattr(config, name, None))), "unknown")
    for name, stack in present.items():
        block = lists[name][0]
        ups, down = surgery.mlp_linears(block, stack)
        sizes = [surgery.layout(block, attention) for attention in stack.attention]
        parts = [f"width {surgery.weight_2d(down).shape[0]}"]
        for kind, units in most_units({name: shapes[name]}).items():
            if kind.attention is None:
                parts.append(f"{units} neurons{' and gates' if len(ups) > 1 else ''}")
            else:
                _, query, key = sizes[kind.attention]
                parts.append(f"{units} heads of {f'{query // key} x ' if query > key else ''}{key}")
        found[f"{name} block"] = ", ".join(
            [*parts, activation, "shared bias" if stack.bias else "no bias of positions"]
        )
        found[f"{name} layers"] = str(len(lists[name]))
    return found | machine_key(terms)


def machine_key(terms: Terms) -> dict[str, str]:
    """The part of it that no model has a say in."""
    installed = versions()
    return {
        "engine": f"{terms.engine} {installed.get(terms.engine, 'unknown')}",
        "precision": terms.precision,
        "batch x tokens": str(terms.point),
        "threads": str(terms.threads),
        "processor": f"{cpu_model()} ({' '.join(cpu_flags())})",
        "flyweight": installed.get("flyweight", "unknown"),
    }


def file_name(key: Mapping[str, str]) -> str:
    """Of a table in the cache."""
    return hashlib.sha256(json.dumps([FORMAT, dict(key)], sort_keys=True).encode()).hexdigest()[:32] + ".json"


def read_table(path: Path, key: Mapping[str, str], whole: bool = True) -> Table:
    """The table in a file or an artifact, for the model, engine and machine that `key` tells; not `whole`: a part of a key.

    Raises StepError for one of another machine, engine or shape (both are named), and FileNotFoundError; ValueError for a file
    that is damaged; ArtifactError for a folder that is none.
    """
    try:
        table = _of_artifact(path) if path.is_dir() else Table.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(str(error)) from None
    if table.format != FORMAT:
        raise StepError(f"a table of costs of format {FORMAT}", f"{table.format} in {path}", "have it measured again")
    for name in [*key, *(table.key if whole else ())]:
        if table.key.get(name) != key.get(name):
            raise StepError(
                f"a table of costs for {name} '{key.get(name, 'none')}'",
                f"one for '{table.key.get(name, 'none')}' in {path}",
                "leave the table out, and one is measured here",
            )
    return table


def _of_artifact(path: Path) -> Table:
    """The one that its last wish was met by, as `_about` keeps it in the notes of the step. Raises StepError for none."""
    for step in reversed(read_manifest(path).steps):
        costs = step.notes.get("costs")
        if isinstance(costs, dict) and "table" in costs:
            return Table.model_validate(costs["table"])
    raise StepError(
        "an artifact with a table of costs", f"none in {path}", "name one that was pruned by speedup and cost latency"
    )


def costs_of(table: Table) -> Costs:
    """By the formulas at the top of this file."""
    anchor = table.rows[0]
    raw = {kind: _curve(table, kind) for kind in anchor.probe.kept}
    curves = {kind: curve - curve[1] for kind, curve in raw.items()}
    each = {stack: (_deeper(table, stack) - anchor.ms) for stack in anchor.deep}
    each = {stack: taken / (_depth(table, stack) - anchor.deep[stack]) for stack, taken in each.items()}
    inside = sum(anchor.deep[stack] * taken for stack, taken in each.items())
    if inside > anchor.ms:  # by noise: nothing lies outside
        each = {stack: taken * anchor.ms / inside for stack, taken in each.items()}
    base = max(anchor.ms - inside, 0.0)
    kept = anchor.probe.kept
    block = {
        stack: max(taken - sum(float(curves[kind][kept[kind]]) for kind in kinds_of(curves, stack)), 0.0)
        for stack, taken in each.items()
    }
    costs = Costs("ms", base, block, curves)
    return Costs("ms", base, block, curves, _multiple(table), _about(table, costs))


def predicted(costs: Costs, probe: Probe) -> float:
    """Milliseconds of a probe by the table."""
    total = costs.base + sum(depth * costs.block[stack] for stack, depth in probe.deep.items())
    return total + sum(probe.deep[kind.stack] * float(costs.curves[kind][units]) for kind, units in probe.kept.items())


def _single(table: Table, kind: Kind) -> dict[int, Row]:
    """{units of this kind: row} where all else is as in the anchor."""
    anchor = table.rows[0]
    found = {}
    for row in table.rows:
        others = {k: units for k, units in row.probe.kept.items() if k != kind}
        if row.deep == anchor.deep and others == {k: v for k, v in anchor.probe.kept.items() if k != kind}:
            found[row.probe.kept[kind]] = row
    return dict(sorted(found.items()))


def _curve(table: Table, kind: Kind) -> NDArray[np.float64]:
    """[units + 1] ms that a block with k units takes more than the anchor's; entry 0 is NaN where it was not measured.

    A part that is gone tells nothing of one with few units, which cost nearly what a panel of them does.
    """
    anchor, rows = table.rows[0], _single(table, kind)
    most = max(rows)
    some = [k for k in rows if kind.attention is not None or regular(k, most)]
    each = rising([(rows[k].ms - anchor.ms) / anchor.deep[kind.stack] for k in some])
    gone = each.pop(0) if (some := sorted(some))[0] == 0 else np.nan
    curve = np.interp(np.arange(most + 1), [k for k in some if k], each)
    curve[0] = gone
    return curve


def rising(values: Iterable[float]) -> list[float]:
    """The nearest values in the least squares sense that never fall: neighbours that do are pooled (Ayer et al. 1955)."""
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        mean, number = float(value), 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, number = (before * many + mean * number) / (many + number), many + number
        pools.append((mean, number))
    return [mean for mean, number in pools for _ in range(number)]


def _deeper(table: Table, stack: str) -> float:
    return next(row.ms for row in table.rows if _is_deeper(table, row, stack))


def _depth(table: Table, stack: str) -> int:
    return next(row.deep[stack] for row in table.rows if _is_deeper(table, row, stack))


def _is_deeper(table: Table, row: Row, stack: str) -> bool:
    anchor = table.rows[0]
    return row.deep.get(stack, 0) > anchor.deep[stack] and row.probe.kept == anchor.probe.kept


def _odd(table: Table) -> dict[int, list[tuple[float, float]]]:
    """{neurons beyond a multiple of PANEL: [(how much longer than regular ones beside it, the same at least)]}"""
    found: dict[int, list[tuple[float, float]]] = {}
    for kind in table.rows[0].probe.kept:
        if kind.attention is not None:
            continue
        rows = _single(table, kind)
        most = max(rows)
        some = [k for k in rows if regular(k, most)]
        middle = [rows[k].ms for k in some]
        high = [rows[k].high or np.inf for k in some]
        for k in rows.keys() - set(some):
            seen = rows[k].ms / np.interp(k, some, middle) - 1
            sure = (rows[k].low or 0.0) / np.interp(k, some, high) - 1
            found.setdefault(k % PANEL, []).append((float(seen), float(sure)))
    return dict(sorted(found.items()))


def _multiple(table: Table) -> int:
    """PANEL where numbers of neurons between its multiples are surely slower; half of it where only odd ones are."""
    slow = {beyond for beyond, seen in _odd(table).items() if all(sure > SLOW for _, sure in seen)}
    if PANEL // 2 in slow:
        return PANEL
    return PANEL // 2 if slow else 1


def _about(table: Table, costs: Costs) -> dict[str, Any]:
    """For the record: `additive` is the measured time of probes that change several kinds, against the sum; `table` is all that
    the costs follow from, for later runs.
    """
    anchor = table.rows[0].probe
    several = [
        row.ms / predicted(costs, row.probe) - 1
        for row in table.rows
        if sum(row.probe.kept[kind] != units for kind, units in anchor.kept.items()) > 1
    ]
    return {
        "measured": "medians of interleaved rounds, each round's slowness taken out",
        **table.key,
        "rounds": table.rounds,
        "seconds": round(table.seconds, 1),
        "spread": round(table.spread, 4) if np.isfinite(table.spread) else None,
        "additive": [round(error, 4) for error in several],
        "odd_neurons": {str(k): round(max(seen for seen, _ in found), 4) for k, found in _odd(table).items()},
        "base_ms": round(costs.base, 4),
        "block_ms": {stack: round(value, 4) for stack, value in costs.block.items()},
        "table": table.model_dump(mode="json"),
    }


def _half_widths(rows: Iterable[Row]) -> list[float]:
    return [(row.high - row.low) / 2 / row.ms for row in rows if row.low is not None and row.high is not None]
