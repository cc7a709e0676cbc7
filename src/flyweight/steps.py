"""The one table of steps. Listing it imports nothing heavy: the functions are dotted paths."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from flyweight.errors import SettingsError, nearest
from flyweight.settings import DistillSettings, FinetuneSettings, PruneSettings, QuantizeSettings, Settings

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.models.bundle import Bundle

    Run = Callable[[Bundle, Any, Context], Bundle]

__all__ = ["STEPS", "Step", "step_named"]


class Step(NamedTuple):
    """settings: its class; path: `module:function`, (bundle, settings, context) -> bundle; summary: one line of help."""

    settings: type[Settings]
    path: str
    summary: str

    def function(self) -> Run:
        module, name = self.path.split(":")
        return cast("Run", getattr(importlib.import_module(module), name))


STEPS = {
    "finetune": Step(FinetuneSettings, "flyweight.methods.finetune:finetune", "train all weights on labelled data"),
    "distill": Step(DistillSettings, "flyweight.methods.distill:distill", "train a student to answer as its teacher"),
    "prune": Step(PruneSettings, "flyweight.methods.prune:prune", "remove weights, heads, neurons, layers or tokens"),
    "quantize": Step(QuantizeSettings, "flyweight.methods.quantize:quantize", "store weights in 8 to 1 bits"),
}


def step_named(name: str) -> Step:
    """Raises SettingsError listing the known steps."""
    if name not in STEPS:
        raise SettingsError("a step", f"'{name}'{nearest(name, STEPS)}", f"known: {', '.join(STEPS)}")
    return STEPS[name]
