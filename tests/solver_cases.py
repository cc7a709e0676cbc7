"""What the tests of the weights' solvers share: tiny models, grids of every kind, a step on them, errors block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flyweight.context import Context
from flyweight.data import Examples
from flyweight.methods.quantize import quantize
from flyweight.methods.quantize.grid import Grid
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.models.load import load
from flyweight.settings import QuantizeSettings
from flyweight.tasks import Task, task_named
from tiny import SENTENCES

TASK = task_named("embedding")
LAYOUTS = ("bert", "llama", "gpt2", "t5")  # norms after and before the sum, gates, grouped heads, Conv1D, two stacks
GRIDS = (
    Grid(4, "symmetric", "group", 8),
    Grid(3, "asymmetric", "group", 8),
    Grid(4, "symmetric", "channel"),
    Grid(2, "asymmetric", "channel"),
    Grid(4, "asymmetric", "tensor"),
)


def opened(tiny: Callable[..., Path], family: str) -> Bundle:
    return load(tiny(family), TASK)


def texts(bundle: Bundle) -> Examples:
    return bundle.encoder._replace(truncate=True).examples(SENTENCES)


def context(tmp_path: Path, calibration: Examples | None = None, task: Task = TASK) -> Context:
    def none(*arguments: Any) -> Bundle:
        raise AssertionError("quantizing needs no other model")

    return Context(task=task, seed=0, work=tmp_path, reference=none, load=none, calibration=calibration)


def settings_for(grid: Grid, method: str, **changes: Any) -> QuantizeSettings:
    values: dict[str, Any] = {
        "bits": grid.bits,
        "scheme": grid.scheme,
        "granularity": grid.granularity,
        "group_size": grid.group_size or 64,
        "method": method,
        "activations": "none",
        "embeddings": None,
    }
    return QuantizeSettings(**{**values, **changes})


def stepped(bundle: Bundle, settings: QuantizeSettings, tmp_path: Path) -> tuple[Bundle, Context]:
    """The step on `bundle`, in place, calibrated on the sentences."""
    made = context(tmp_path, texts(bundle))
    return quantize(bundle, settings, made), made


def sparsified(bundle: Bundle) -> Bundle:
    names = [f"{name}.weight" for name in surgery.linears(bundle.model, bundle.family)]
    with torch.no_grad():
        for name in names:
            weight = bundle.model.get_parameter(name)
            weight[weight.abs() < weight.abs().median()] = 0
    return replace(bundle, sparse=dict.fromkeys(names, "unstructured"))


def block_outputs(bundle: Bundle, examples: Examples) -> list[torch.Tensor]:
    """What every block answers, all texts in a row, one after another so that nothing is padded."""
    found: list[list[torch.Tensor]] = []
    hooks = []
    for modules in surgery.blocks(bundle.model, bundle.family).values():
        for block in modules:
            kept: list[torch.Tensor] = []
            found.append(kept)
            hooks.append(block.register_forward_hook(lambda _, __, out, kept=kept: kept.append(first(out).flatten())))
    with torch.no_grad():
        for i in range(len(examples)):
            arrays = {k: torch.from_numpy(v) for k, v in examples.batch([i], bundle.encoder.pad).items()}
            named = {k: arrays[k] for k in bundle.family.inputs if k in arrays}
            if bundle.model.config.is_encoder_decoder:
                named["decoder_input_ids"] = arrays["input_ids"]
            bundle.model.eval()(**named)
    for hook in hooks:
        hook.remove()
    return [torch.cat(kept) for kept in found]


def block_errors(floats: Bundle, made: Bundle, examples: Examples) -> list[float]:
    """Relative error of what every block answers."""
    pairs = zip(block_outputs(made, examples), block_outputs(floats, examples), strict=True)
    return [float((a - b).norm() / b.norm()) for a, b in pairs]


def first(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found
