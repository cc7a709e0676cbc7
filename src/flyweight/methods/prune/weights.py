"""Single weights to zero: at once, by what they are or by what flows into them, or in training."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flyweight.errors import StepError
from flyweight.methods.prune import masks
from flyweight.methods.prune.blockwise import restore_blocks
from flyweight.methods.prune.gradual import train_while_pruning
from flyweight.methods.prune.restore import texts
from flyweight.methods.prune.sparsegpt import sparsegpt
from flyweight.methods.prune.wanda import wanda
from flyweight.models import surgery

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["prune_weights"]


def prune_weights(bundle: Bundle, settings: PruneSettings, context: Context) -> dict[str, Any]:
    """Zero weights of the blocks' linears in place and name them in `bundle.sparse`. Returns the step's notes.

    Raises StepError: a skip pattern that matches nothing, an amount or threshold that comes to nothing or to everything, a
    pattern that fits no weight, no texts or labels where criterion or schedule need them.
    """
    names, left_out = _candidates(bundle, settings)
    before = _zeros(bundle, names)
    notes: dict[str, Any] = {}
    if settings.restore == "block":
        texts(settings, context)  # or it would be refused after the zeros
    dense = bundle.copy() if settings.restore == "block" else None
    if settings.criterion in ("hessian", "wanda"):
        notes = _by_layer(bundle, settings, context, names)
    else:
        weights = _Weights(bundle, settings, context.seed, names)
        _check(weights, settings)
        if settings.gradual == "cubic":
            _, notes["training"] = train_while_pruning(bundle, settings, context, weights)
        else:
            weights.apply(weights.choose(settings.amount))
    views, zeros = masks.views(bundle, names), _zeros(bundle, names)
    pattern = masks.stored_as(settings.pattern)
    for name in names:
        if pattern == "2:4" or zeros[name]:
            bundle.sparse[name] = "2:4" if bundle.sparse.get(name) == "2:4" else pattern
    if dense is not None:
        notes["block_error"] = restore_blocks(bundle, dense, settings, context)
    return {
        **notes,
        "target": "weights",
        "removed": sum(zeros.values()) - sum(before.values()),
        "zeros": sum(zeros.values()) / sum(view.numel() for view in views.values()),
        "zeros_by_tensor": {name: round(zeros[name] / views[name].numel(), 4) for name in names},
        **({"left_out": left_out} if left_out else {}),
    }


def _by_layer(bundle: Bundle, settings: PruneSettings, context: Context, names: list[str]) -> dict[str, Any]:
    """What goes is judged by what flows into each linear, block after block."""
    some, share = texts(settings, context), settings.amount if settings.pattern == "unstructured" else None
    if settings.criterion == "wanda":
        wanda(bundle, some, names, share=share, pattern=settings.pattern, progress=context.progress)
        return {}
    return sparsegpt(
        bundle,
        some,
        names,
        share=share,
        pattern=settings.pattern,
        damping=settings.damping,
        progress=context.progress,
    )


class _Weights:
    """Single weights on their way out."""

    def __init__(self, bundle: Bundle, settings: PruneSettings, seed: int, names: list[str]) -> None:
        self.bundle, self.settings, self.seed, self.names = bundle, settings, seed, names

    def views(self) -> dict[str, Tensor]:
        return masks.views(self.bundle, self.names)

    def choose(self, share: float | None) -> dict[str, Tensor]:
        kept = masks.masks(self.views(), self.settings, share, self.seed)
        return {name: ~mask for name, mask in kept.items()}

    def apply(self, gone: dict[str, Tensor]) -> None:
        views = self.views()
        for name, mask in gone.items():
            views[name].masked_fill_(mask.to(views[name].device), 0.0)


def _zeros(bundle: Bundle, names: list[str]) -> dict[str, int]:
    return {name: int((view == 0).sum()) for name, view in masks.views(bundle, names).items()}


def _candidates(bundle: Bundle, settings: PruneSettings) -> tuple[list[str], list[str]]:
    """(weights to prune, weights that do not fit the pattern). Raises StepError for a skip that matches nothing."""
    modules = surgery.linears(bundle.model, bundle.family)
    widths = {f"{name}.weight": surgery.weight_2d(module).shape[1] for name, module in modules.items()}
    for pattern in settings.skip:
        if not any(_matches(name, pattern) for name in widths):
            raise StepError(
                "a skip pattern that matches a weight", f"'{pattern}'", f"one of them is {next(iter(widths))}"
            )
    widths = {n: width for n, width in widths.items() if not any(_matches(n, pattern) for pattern in settings.skip)}
    if not widths:
        raise StepError("some weights to prune", "all of them skipped", "drop a skip pattern")
    return masks.fitting(widths, settings.pattern)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name.removesuffix(".weight"), pattern)


def _check(weights: _Weights, settings: PruneSettings) -> None:
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
