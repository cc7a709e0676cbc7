"""What a layer is worth: how far it turns the hidden states, or what the model loses without it. Small ones go first."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.calibration import walk
from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.methods.prune.scores import Group, Scores, groups
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.tasks import task_named
from flyweight.training import predict

__all__ = ["Removal", "cosine", "greedy", "loss", "skipped"]

Answers = NDArray[np.float32]


class Removal(NamedTuple):
    """One layer gone, by the number it had. harm: what the model has lost by then, see `loss`"""

    stack: str
    layer: int
    harm: float


def cosine(bundle: Bundle, examples: Examples, progress: Progress | None = None) -> Scores:
    """1 - cosine(hidden state before a block, after it), mean over all tokens (Men et al. 2024, section 3, "block influence").

    Padding is never looked at. Streams block by block: one block's inputs are held, see `calibration.walk`, which says what
    is raised. An encoder-decoder is walked with the same text on both sides.
    """
    found = {group: torch.zeros(size) for group, size in groups(bundle, "layers").items()}
    for block in walk(bundle, examples, progress, "layers: cosine"):
        total, tokens = 0.0, 0
        outputs = []
        for batch, before in enumerate(block.inputs):
            with torch.no_grad():
                after = block.run(batch)
            same = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)  # [texts, tokens]
            total += float((1 - same).sum())
            tokens += same.numel()
            outputs.append(after)
        block.outputs = outputs
        found[Group(block.stack)][block.number] = total / tokens
    return found


def loss(bundle: Bundle, examples: Examples, progress: Progress | None = None) -> Scores:
    """What the model loses without each layer alone, on all `examples`: one pass a layer.

    With labels: the rise of the task's mean loss; without: 1 - cosine of its answers to those of the whole model, mean over
    the examples. Raises StepError without examples and for answers that are no numbers.
    """
    found = {group: torch.zeros(size) for group, size in groups(bundle, "layers").items()}
    harm = _Harm(bundle, examples)
    places = [(group.stack, number) for group, size in groups(bundle, "layers").items() for number in range(size)]
    for stack, number in (progress or NoProgress()).track(places, "layers: loss", total=len(places)):
        found[Group(stack)][number] = harm.without({(stack, number)})
    return found


def greedy(
    bundle: Bundle, examples: Examples, share: float, scope: str = "layer", progress: Progress | None = None
) -> tuple[Scores, list[Removal]]:
    """(scores by which `share` of the layers go in the order found here, that order).

    The layer whose loss harms least goes, then all that are left are measured again, without those that went. What goes is
    scored 0, 1, ...; what stays comes after, by its harm. scope `layer`: the same share of each stack; `global`: of all
    stacks together; none loses its last layer. Harm and errors are those of `loss`.
    """
    sizes = groups(bundle, "layers")
    left = {(group.stack, number) for group, size in sizes.items() for number in range(size)}
    quota = {group.stack: int(share * size + 0.5) for group, size in sizes.items()}
    if scope == "global":
        quota = dict.fromkeys(quota, int(share * len(left) + 0.5))
    wanted = sum(quota.values()) if scope == "layer" else int(share * len(left) + 0.5)
    harm = _Harm(bundle, examples)
    gone: list[Removal] = []
    last: dict[tuple[str, int], float] = {}
    for _ in (progress or NoProgress()).track(range(wanted), "layers: loss, one after the other", total=wanted):
        out = {(one.stack, one.layer) for one in gone}
        counts = {stack: sum(name == stack for name, _ in left - out) for stack in quota}
        free = {place for place in left - out if counts[place[0]] > 1 and _open(place[0], quota, out)}
        if not free:
            break
        last |= {place: harm.without(out | {place}) for place in sorted(free)}
        place = min(sorted(free), key=lambda one: last[one])
        gone.append(Removal(*place, last.pop(place)))
    found = {group: torch.zeros(size) for group, size in sizes.items()}
    stay = sorted(left - {(one.stack, one.layer) for one in gone}, key=lambda one: (last.get(one, math.inf), one))
    for rank, (stack, number) in enumerate([*((one.stack, one.layer) for one in gone), *stay]):
        found[Group(stack)][number] = rank
    return found, gone


def _open(stack: str, quota: dict[str, int], out: Collection[tuple[str, int]]) -> bool:
    """Whether this stack may lose a further layer."""
    return sum(name == stack for name, _ in out) < quota[stack]


@contextlib.contextmanager
def skipped(bundle: Bundle, layers: Collection[tuple[str, int]]) -> Iterator[None]:
    """While inside, these (stack, number) hand on the hidden states that they are given; what else they answer, such as a
    position bias, stays. For the answers that is what cutting them out does."""

    def identity(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        state: Tensor = given[0] if given else named["hidden_states"]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    lists = surgery.blocks(bundle.model, bundle.family)
    hooks = [lists[stack][number].register_forward_hook(identity, with_kwargs=True) for stack, number in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Harm:
    """Answers of the whole model, and how far others lie from them."""

    def __init__(self, bundle: Bundle, examples: Examples) -> None:
        if not len(examples):
            raise StepError("texts to measure layers on", "none", "give --validation F or --train F")
        self.bundle, self.examples, self.task = bundle, examples, task_named(bundle.task)
        self.labels = None
        if self.task.labelled and examples.labels is not None:
            self.labels = torch.from_numpy(np.ascontiguousarray(examples.labels))
        self.whole = self._answers("the whole model")
        self.least = self._loss(self.whole) if self.labels is not None else 0.0

    def without(self, layers: Collection[tuple[str, int]]) -> float:
        with skipped(self.bundle, layers):
            answers = self._answers(f"the model without {', '.join(f'{stack}.{n}' for stack, n in sorted(layers))}")
        if self.labels is not None:
            return self._loss(answers) - self.least
        one, other = (torch.from_numpy(x).double().reshape(len(x), -1) for x in (self.whole, answers))
        return float((1 - torch.nn.functional.cosine_similarity(one, other, dim=-1)).mean())

    def _loss(self, answers: Answers) -> float:
        assert self.labels is not None
        return float(self.task.loss(torch.from_numpy(answers).double(), self.labels))

    def _answers(self, whose: str) -> Answers:
        found = predict(self.bundle, self.examples)
        if not np.isfinite(found).all():
            raise StepError(f"finite answers of {whose}", "NaN or inf", "check the model and the texts")
        return found
