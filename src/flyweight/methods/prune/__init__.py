"""Removing what matters least: single weights, or heads, neurons and layers."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from flyweight.context import Context, NoProgress
from flyweight.errors import StepError
from flyweight.methods.prune import masks, structured
from flyweight.methods.prune.gradual import train_while_pruning
from flyweight.methods.prune.scores import Group, Scores, groups, random, score
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings
from flyweight.training import find_device, placed

__all__ = ["prune"]


def prune(bundle: Bundle, settings: PruneSettings, context: Context) -> Bundle:
    """Prune the bundle's model in place.

    `target: weights` sets weights of the blocks' linears to zero and names them in `bundle.sparse`; heads, neurons and
    layers are physically removed. What went, and how many parameters are left, goes into `context.notes`. Raises
    StepError: quantized weights, an amount that comes to nothing or to everything, no labelled examples where the
    criterion or the schedule needs them.
    """
    if bundle.quantized:
        raise StepError(
            "float weights to prune", f"{len(bundle.quantized)} quantized ones", "put prune before quantize"
        )
    with placed(bundle.model, find_device(context.device)):
        notes = (
            _weights(bundle, settings, context) if settings.target == "weights" else _parts(bundle, settings, context)
        )
    context.notes.update(notes)
    return bundle


# weights


class _Weights:
    """Single weights on their way out."""

    def __init__(self, bundle: Bundle, settings: PruneSettings, seed: int, names: list[str]) -> None:
        self.bundle, self.settings, self.seed, self.names = bundle, settings, seed, names

    def views(self) -> dict[str, Tensor]:
        modules = surgery.linears(self.bundle.model, self.bundle.family)
        return {name: surgery.weight_2d(modules[name.removesuffix(".weight")]).detach() for name in self.names}

    def choose(self, share: float | None) -> dict[str, Tensor]:
        kept = masks.masks(self.views(), self.settings, share, self.seed)
        return {name: ~mask for name, mask in kept.items()}

    def apply(self, gone: dict[str, Tensor]) -> None:
        views = self.views()
        for name, mask in gone.items():
            views[name].masked_fill_(mask.to(views[name].device), 0.0)


def _weights(bundle: Bundle, settings: PruneSettings, context: Context) -> dict[str, Any]:
    names, left_out = _candidates(bundle, settings)
    weights = _Weights(bundle, settings, context.seed, names)
    before = {name: int((view == 0).sum()) for name, view in weights.views().items()}
    _check_weights(weights, settings)
    notes: dict[str, Any] = {}
    if settings.gradual == "cubic":
        _, notes["training"] = train_while_pruning(bundle, settings, context, weights)
    else:
        weights.apply(weights.choose(settings.amount))
    views = weights.views()
    zeros = {name: int((view == 0).sum()) for name, view in views.items()}
    for name in names:
        if settings.pattern == "2:4" or zeros[name]:
            pattern = "2:4" if settings.pattern == "2:4" else "unstructured"
            bundle.sparse[name] = "2:4" if bundle.sparse.get(name) == "2:4" else pattern
    total = sum(view.numel() for view in views.values())
    return {
        **notes,
        "target": "weights",
        "removed": sum(zeros.values()) - sum(before.values()),
        "zeros": sum(zeros.values()) / total,
        "zeros_by_tensor": {name: round(zeros[name] / views[name].numel(), 4) for name in names},
        **({"left_out": left_out} if left_out else {}),
    }


def _candidates(bundle: Bundle, settings: PruneSettings) -> tuple[list[str], list[str]]:
    """(weights to prune, weights that do not fit the 2:4 pattern). Raises StepError for a skip that matches nothing."""
    modules = surgery.linears(bundle.model, bundle.family)
    names = [f"{name}.weight" for name in modules]
    for pattern in settings.skip:
        if not any(_matches(name, pattern) for name in names):
            raise StepError("a skip pattern that matches a weight", f"'{pattern}'", f"one of them is {names[0]}")
    names = [name for name in names if not any(_matches(name, pattern) for pattern in settings.skip)]
    if not names:
        raise StepError("some weights to prune", "all of them skipped", "drop a skip pattern")
    if settings.pattern != "2:4":
        return names, []
    fits = [n for n in names if surgery.weight_2d(modules[n.removesuffix(".weight")]).shape[1] % 4 == 0]
    if not fits:
        raise StepError("weights with inputs in fours for the pattern 2:4", "none", "set pattern to unstructured")
    return fits, [name for name in names if name not in fits]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


def _check_weights(weights: _Weights, settings: PruneSettings) -> None:
    views = weights.views()
    if settings.threshold is not None:
        largest = max(float(view.abs().max()) for view in views.values())
        if largest < settings.threshold:
            raise StepError(
                "a threshold that leaves some weights", f"{settings.threshold}", f"the largest weight is {largest:.3g}"
            )
        if not any(bool((view.abs() < settings.threshold).any()) for view in views.values()):
            smallest = min(float(view.abs().min()) for view in views.values())
            raise StepError(
                "a threshold that removes a weight", f"{settings.threshold}", f"the smallest weight is {smallest:.3g}"
            )
    elif settings.amount is not None:
        sizes = [view.numel() for view in views.values()]
        sizes = [sum(sizes)] if settings.scope == "global" else sizes
        if not any(int(settings.amount * size + 0.5) for size in sizes):
            raise StepError(f"an amount that removes a weight of {max(sizes)}", f"{settings.amount}", "raise it")
        if all(int(settings.amount * size + 0.5) == size for size in sizes):
            raise StepError(f"an amount that leaves a weight of {max(sizes)}", f"{settings.amount}", "lower the amount")


# heads, neurons, layers


class _Parts:
    """Heads or neurons on their way out: silenced in training, cut at its end."""

    def __init__(self, bundle: Bundle, settings: PruneSettings, context: Context) -> None:
        self.bundle, self.settings = bundle, settings
        self.context = replace(context, progress=NoProgress())  # no bars inside the training's
        self.multiple = settings.multiple_of if settings.target == "neurons" else 1
        self.by_name = {str(group): group for group in groups(bundle, settings.target)}
        self.gone: dict[str, Tensor] = {}

    def choose(self, share: float) -> dict[str, Tensor]:
        found = self._scores()
        for name, units in self.gone.items():  # what is gone comes last, whatever its weights became
            found[self.by_name[name]].masked_fill_(units.cpu(), -1.0)
        keep = structured.select(found, share, self.settings.scope, self.multiple)
        self.gone = {}
        for group, stay in keep.items():
            self.gone[str(group)] = torch.ones(len(found[group]), dtype=torch.bool)
            self.gone[str(group)][stay] = False
        return self.gone

    def _scores(self) -> Scores:
        if self.settings.criterion == "random":
            return random(self.bundle, self.settings.target, self.context.seed)
        return score(self.bundle, self.settings, self.context)

    def apply(self, gone: dict[str, Tensor]) -> None:
        self.gone = gone  # also after a resume
        structured.silence(self.bundle, {self.by_name[name]: units for name, units in gone.items()})


def _parts(bundle: Bundle, settings: PruneSettings, context: Context) -> dict[str, Any]:
    assert settings.amount is not None
    structured.check(groups(bundle, settings.target), settings)
    notes: dict[str, Any] = {}
    if settings.gradual == "cubic":
        parts = _Parts(bundle, settings, context)
        gone, notes["training"] = train_while_pruning(bundle, settings, context, parts)
        keep: dict[Group, list[int]] = {
            parts.by_name[name]: (~units).nonzero()[:, 0].tolist() for name, units in gone.items()
        }
    else:
        multiple = settings.multiple_of if settings.target == "neurons" else 1
        keep = structured.select(score(bundle, settings, context), settings.amount, settings.scope, multiple)
    notes |= structured.cut(bundle, settings.target, keep)
    modules = surgery.linears(bundle.model, bundle.family)
    for name in [name for name, pattern in bundle.sparse.items() if pattern == "2:4"]:
        if not masks.is_two_of_four(surgery.weight_2d(modules[name.removesuffix(".weight")])):
            bundle.sparse[name] = "unstructured"  # columns left, and the fours are other fours now
    return notes
