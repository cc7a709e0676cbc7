"""Removing what matters least: single weights, or heads, neurons, layers and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flyweight.context import Context
from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.methods.prune import masks, structured
from flyweight.methods.prune.blockwise import restore_blocks
from flyweight.methods.prune.layers import cosine, greedy
from flyweight.methods.prune.learned import prune_by_gates
from flyweight.methods.prune.parts import prune_parts, prune_while_training
from flyweight.methods.prune.restore import texts
from flyweight.methods.prune.scores import groups, sample, score
from flyweight.methods.prune.vocabulary import prune_vocabulary
from flyweight.methods.prune.weights import prune_weights
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings
from flyweight.training import find_device, placed

__all__ = ["prune"]


def prune(bundle: Bundle, settings: PruneSettings, context: Context) -> Bundle:
    """Prune the bundle's model in place; where its vocabulary goes, the bundle that is returned has another tokenizer.

    `target: weights` sets weights of the blocks' linears to zero and names them in `bundle.sparse`; heads, neurons, layers and
    tokens are physically removed. What went, and how many parameters are left, goes into `context.notes`. Raises
    StepError: quantized weights, an amount that comes to nothing or to everything, a wish that nothing meets, no labelled
    examples or texts where the criterion, restoring or the schedule needs them.
    """
    if bundle.quantized:
        raise StepError(
            "float weights to prune", f"{len(bundle.quantized)} quantized ones", "put prune before quantize"
        )
    with placed(bundle.model, find_device(context.device)):
        if settings.target == "vocabulary":
            bundle, notes = prune_vocabulary(bundle, settings, context)
        else:
            notes = _way(settings)(bundle, settings, context)
            _rename_patterns(bundle)
    context.notes.update(notes)
    return bundle


def _way(settings: PruneSettings) -> Callable[[Bundle, PruneSettings, Context], dict[str, Any]]:
    """Prunes in place and gives the notes."""
    if settings.target in ("weights", "layers"):
        return prune_weights if settings.target == "weights" else _layers
    ways = {"one-shot": prune_parts, "cubic": prune_while_training, "l0": prune_by_gates}
    return ways[settings.gradual]


def _layers(bundle: Bundle, settings: PruneSettings, context: Context) -> dict[str, Any]:
    assert settings.amount is not None
    structured.check(groups(bundle, "layers"), settings)
    if settings.restore == "block":
        texts(settings, context)  # or it would be refused after the scores
    notes: dict[str, Any] = {}
    if settings.criterion == "cosine":
        scores = cosine(bundle, texts(settings, context), context.progress)
    elif settings.criterion == "loss":
        some = _judged_on(settings, context)
        scores, order = greedy(bundle, some, settings.amount, settings.scope, context.progress)
        notes["order"] = [one._asdict() for one in order]
    else:
        scores = score(bundle, settings, context)
    if settings.criterion != "random":
        notes["scores"] = {str(group): [round(one, 6) for one in found.tolist()] for group, found in scores.items()}
    keep = structured.select(scores, settings.amount, settings.scope)
    dense = bundle.copy() if settings.restore == "block" else None
    notes |= structured.cut(bundle, "layers", keep)
    if dense is not None:
        kept = {group.stack: stay for group, stay in keep.items()}
        notes["block_error"] = restore_blocks(bundle, dense, settings, context, kept)
    return notes


def _judged_on(settings: PruneSettings, context: Context) -> Examples:
    """Examples that were not trained on, where there are any. Raises StepError for none."""
    if context.validation is not None and len(context.validation):
        return sample(context.validation, settings.samples, context.seed)
    labelled = context.train is not None and context.train.labels is not None and context.task.labelled
    if context.train is not None and labelled:
        return sample(context.train, settings.samples, context.seed)
    return texts(settings, context)


def _rename_patterns(bundle: Bundle) -> None:
    """Where columns left, the fours of 2:4 are other fours now."""
    modules = surgery.linears(bundle.model, bundle.family)
    for name in [name for name, pattern in bundle.sparse.items() if pattern == "2:4"]:
        if not masks.is_two_of_four(surgery.weight_2d(modules[name.removesuffix(".weight")])):
            bundle.sparse[name] = "unstructured"
