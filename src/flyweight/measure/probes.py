"""Small models that tell what a block costs: a few blocks of the model at hand, with random weights and hardly any vocabulary.

All of them keep the same number of units of every kind but one (the *anchor*), so that their differences are that kind's; one is
deeper, which tells blocks from what lies around them; a few change several kinds at once and show whether costs add up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from flyweight.measure.costs import Kind
from flyweight.models import stream, surgery
from flyweight.models.build import quiet

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle

__all__ = ["PANEL", "Probe", "grid", "plan", "regular", "small_model"]

PANEL = 16
"""Columns that a kernel computes at once are a divisor of this on all CPUs so far: a multiple of it fills them."""
SHARES = (0.0, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
MOST_HEADS = 16
ODD = (1, 8)
"""Neurons beyond a multiple of PANEL at which the table looks for sizes that are slow."""
DEEPER = 3
VOCABULARY = 64
POSITIONS = 16  # at least as many as the export is traced with


class Probe(NamedTuple):
    """kept: units of each kind in every block; deep: {stack: blocks}"""

    kept: dict[Kind, int]
    deep: dict[str, int]


def regular(units: int, most: int) -> bool:
    """Whether a number of neurons is one that others are interpolated between."""
    return most <= PANEL or units == most or units % PANEL == 0


def grid(most: int, neurons: bool) -> list[int]:
    """Regular numbers of units to measure, ascending, from few to `most`."""
    if not neurons:
        return sorted({int(k) for k in np.linspace(1, most, min(most, MOST_HEADS)).round()})
    if most <= PANEL:
        return list(range(1, most + 1))
    return sorted({min(max(PANEL, round(share * most / PANEL) * PANEL), most) for share in SHARES} | {most})


def plan(most: Mapping[Kind, int], blocks: int, removable: Collection[Kind] = ()) -> dict[str, Probe]:
    """{name: probe}; the first is the anchor, at about a quarter of each kind.

    most: the most units that a block of the model has, by kind; blocks: of every stack; removable: kinds that may go altogether
    """
    grids = {kind: grid(units, kind.attention is None) for kind, units in most.items()}
    middle = {kind: _nearest(values, most[kind] / 4) for kind, values in grids.items()}
    deep = {kind.stack: blocks for kind in most}
    found = {"anchor": Probe(middle, deep)}
    for kind, values in grids.items():
        others = [k for k in values if k != middle[kind]]
        if kind.attention is None and most[kind] > 4 * PANEL:
            half = _nearest(values, most[kind] / 2)
            others += [k + odd for k in (middle[kind], half) for odd in ODD]
        others += [0] if kind in removable else []
        found |= {f"{kind}: {k}": Probe({**middle, kind: k}, deep) for k in others}
    for stack in deep:
        found[f"{stack}: {DEEPER * blocks} blocks"] = Probe(middle, {**deep, stack: DEEPER * blocks})
    found["all of all"] = Probe(dict(most), deep)
    found["half of all"] = Probe({kind: _nearest(grids[kind], most[kind] / 2) for kind in most}, deep)
    found["few heads"] = Probe({kind: grids[kind][0 if kind.attention is not None else -1] for kind in most}, deep)
    return found


def _nearest(values: list[int], wanted: float) -> int:
    return min(values, key=lambda k: abs(k - wanted))


def small_model(bundle: Bundle, probe: Probe, tokens: int) -> Bundle:
    """A model of the bundle's kind with the probe's shapes, for texts of `tokens` tokens; random weights, always the same.

    Where blocks share a position bias, neighbours keep different heads, as blocks of a pruned model do: each then has to take its
    own columns out.
    """
    config = deepcopy(bundle.model.config)
    for name, stack in surgery.stacks(bundle.model, bundle.family).items():
        setattr(config, stack.layers_key, probe.deep[name])
    special = [value for key, value in config.to_dict().items() if key.endswith("_token_id") and isinstance(value, int)]
    config.vocab_size = min(config.vocab_size, max(VOCABULARY, bundle.encoder.pad + 1, *(one + 1 for one in special)))
    if isinstance(getattr(config, "max_position_embeddings", None), int):
        needed = max(tokens, POSITIONS) + bundle.family.position_offset
        config.max_position_embeddings = min(config.max_position_embeddings, needed)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model: Any = type(bundle.model)(config)
        model.eval()
    stream.fit_width(model, bundle.family)
    for name, modules in surgery.blocks(model, bundle.family).items():
        for kind, units in probe.kept.items():
            if kind.stack != name:
                continue
            for number in range(len(modules)):
                _cut(model, bundle, kind, number, units)
    return replace(bundle, model=model, quantized={}, sparse={}, activations="none")


def _cut(model: torch.nn.Module, bundle: Bundle, kind: Kind, block: int, units: int) -> None:
    if kind.attention is None:
        surgery.keep_neurons(model, bundle.family, kind.stack, block, range(units))
        return
    row = surgery.stacks(model, bundle.family)[kind.stack].attention[kind.attention]
    has = surgery.layout(surgery.blocks(model, bundle.family)[kind.stack][block], row).units
    first = has - units if block % 2 else 0
    surgery.keep_heads(model, bundle.family, kind.stack, block, kind.attention, range(first, first + units))
