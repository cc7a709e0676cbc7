"""What each head, group of neurons, attention, feed-forward and layer of a model costs to lose alone, on the user's data.

Nothing is estimated by gradients: the linear that reads the part gets zeros for it (o for heads, the last linear of the
feed-forward for neurons), which is what cutting it out does, biases staying; a layer is left out, its input taken for its
output. Costs do not add up: two heads that can stand in for each other cost little each, and much together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.errors import ModelError, StorageError
from flyweight.measure.environment import usable_memory
from flyweight.measure.harm import Harm, Part, spans
from flyweight.measure.replay import Entered, Replay, left_to_run, silenced, stacks_of
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.models.family import Stack
from flyweight.runtime import neutral_batch
from flyweight.tasks import Task, task_named

__all__ = ["sensitivity"]

Floats = NDArray[np.float64]
Outputs = NDArray[np.float32]


class Yardstick(NamedTuple):
    """How answers are judged, one number an example. costs: more is worse; metric: more is better, or None."""

    cost: str
    costs: Callable[[Outputs], Floats]
    metric: str | None
    scores: Callable[[Outputs], Floats] | None


class Silence(NamedTuple):
    """What is done to the model for one part. reader None: the whole block is left out."""

    part: dict[str, Any]
    reader: nn.Module | None
    columns: Tensor | None


@dataclass(frozen=True)
class Place:
    """One block and where it is."""

    stack: str
    row: Stack
    number: int
    block: nn.Module
    left: int
    """Blocks that run when a replay begins here."""


def sensitivity(
    bundle: Bundle, examples: Examples, groups: int = 8, seed: int = 0, progress: Progress | None = None
) -> Harm:
    """Lose every part in turn and judge the answers.

    examples: with labels the cost is the rise of the task's loss, beside the change of its metric; without, what became of the
              answers: 1 - cosine to the whole model's for a task without classes, else KL(whole || without)
    groups:   of each block's neurons, equally large: group 0 holds those that write most into the hidden states, by root mean
              square activation x length of the neuron's column of the linear that reads it

    The model is left as it was. Time grows with parts x examples; it is told by a note before the work. Raises StepError for
    answers that are no numbers, ModelError for a model that the examples alone do not feed, StorageError where the hidden
    states of the examples do not fit into memory.
    """
    progress = progress or NoProgress()
    _feedable(bundle)
    examples = examples.take(np.argsort(-examples.lengths, kind="stable"))
    _refuse_what_cannot_fit(bundle, examples)
    replay = Replay(bundle, examples, neutral_batch(bundle.activations))
    places = _places(bundle)
    with replay.ready():
        replay.warm()
        began = time.perf_counter()
        whole = replay.answers()
        one_pass = time.perf_counter() - began
        yardstick = _yardstick(task_named(bundle.task), examples, whole)
        runs = [1 + _count(place, groups) * place.left for place in places]
        expected = one_pass * (1 + sum(runs) / len(places))
        parts = sum(_count(place, groups) for place in places)
        progress.note(
            f"sensitivity: {parts} parts on {len(examples)} examples, about {_time(expected)} "
            f"(one pass takes {_time(one_pass)}); fewer --samples are quicker"
        )
        told: list[dict[str, Any]] = []
        outputs: list[Outputs] = []
        passed = _ticker(progress, sum(runs))
        for place in places:
            entered = _entered(replay, place)
            passed(1)
            for what in _silences(place, entered, groups):
                told.append({"stack": place.stack, "block": place.number, **what.part})
                outputs.append(_without(replay, place, entered, what))
                passed(place.left)
            replay.leave(stacks_of(bundle)[place.stack][: place.number + 1], entered)
    return Harm(
        task=bundle.task,
        cost=yardstick.cost,
        metric=yardstick.metric,
        whole=_whole(yardstick, whole, examples),
        examples=len(examples),
        tokens=len(examples.ids),
        groups=groups,
        expected=expected,
        seconds=time.perf_counter() - began,
        parts=tuple(_judged(yardstick, whole, told, outputs, seed)),
    )


def _feedable(bundle: Bundle) -> None:
    if bundle.model.config.is_encoder_decoder and not task_named(bundle.task).labelled:
        raise ModelError(
            "a model that answers to a text alone",
            f"a {bundle.family.model_type} model without a classification head, which needs a second text to decode",
            "sensitivity is measured for text-classification and embedding",
        )


def _refuse_what_cannot_fit(bundle: Bundle, examples: Examples) -> None:
    """Of one block, what comes in and what goes out is held for all examples, float32."""
    wanted = 2 * 4 * len(examples.ids) * int(bundle.model.config.hidden_size)
    memory = usable_memory()
    if wanted > memory:
        raise StorageError(
            f"about {wanted / 1e9:.1f} GB of memory for the hidden states of {len(examples)} examples",
            f"a machine with {memory / 1e9:.1f} GB",
            "lower --samples",
        )


def _places(bundle: Bundle) -> list[Place]:
    rows, lists = surgery.stacks(bundle.model, bundle.family), stacks_of(bundle)
    return [
        Place(name, rows[name], number, block, left_to_run(lists, name, number))
        for name, blocks in lists.items()
        for number, block in enumerate(blocks)
    ]


def _count(place: Place, groups: int) -> int:
    heads = sum(surgery.layout(place.block, attention).units for attention in place.row.attention)
    neurons = surgery.weight_2d(surgery.mlp_linears(place.block, place.row)[1]).shape[1]
    whole = sum(surgery.layout(place.block, attention).units > 0 for attention in place.row.attention)
    return heads + whole + min(groups, neurons) + (neurons > 0) + 1


def _entered(replay: Replay, place: Place) -> Entered:
    return replay.enter(place.block, surgery.mlp_linears(place.block, place.row)[1])


def _silences(place: Place, entered: Entered, groups: int) -> Iterator[Silence]:
    """Every part of one block, the smallest first."""
    block, row = place.block, place.row
    for number, attention in enumerate(row.attention):
        units, query, key = surgery.layout(block, attention)
        makers = [(attention.q, query), (attention.k, key), (attention.v, key)]
        if attention.fused:
            makers = [(attention.q, 3 * query)]
        reader = block.get_submodule(attention.o)
        weights = sum(_row_weights(block.get_submodule(path), rows) for path, rows in makers)
        weights += query * surgery.weight_2d(reader).shape[0]
        where = {"attention": number}
        for unit, head in enumerate(surgery.kept_heads(block, attention)):
            columns = torch.arange(unit * query, (unit + 1) * query)
            yield Silence({"kind": "head", **where, "number": unit, "head": head, "weights": weights}, reader, columns)
        if units:
            yield Silence({"kind": "attention", **where, "weights": units * weights}, reader, None)
    ups, down = surgery.mlp_linears(block, row)
    each = sum(_row_weights(up, 1) for up in ups) + surgery.weight_2d(down).shape[0]
    members: tuple[int, ...] = ()
    for number, neurons in enumerate(_groups(entered.squares, down, groups)):
        members = tuple(sorted(neurons.tolist()))
        part = {"kind": "neurons", "number": number, "neurons": members, "weights": each * len(members)}
        yield Silence(part, down, neurons)
    if members:
        yield Silence({"kind": "feed-forward", "weights": each * surgery.weight_2d(down).shape[1]}, down, None)
    table = row.bias.table if row.bias is not None and row.bias.in_block else None  # it moves to the next block
    own = [p.numel() for name, p in block.named_parameters() if table is None or not name.startswith(f"{table}.")]
    yield Silence({"kind": "layer", "weights": sum(own)}, None, None)


def _row_weights(linear: nn.Module, rows: int) -> int:
    return rows * (surgery.weight_2d(linear).shape[1] + (linear.bias is not None))


def _groups(squares: Tensor, down: nn.Module, groups: int) -> list[Tensor]:
    """Positions of the neurons, largest contribution first, in equal parts (sizes differ by one at most)."""
    size = squares.sqrt() * surgery.weight_2d(down).double().norm(dim=0)
    order = size.argsort(descending=True, stable=True).cpu()
    return list(order.tensor_split(min(groups, len(order)))) if len(order) else []


def _without(replay: Replay, place: Place, entered: Entered, what: Silence) -> Outputs:
    if what.reader is None:
        return replay.answers({place.block: entered.skipped})
    with silenced(what.reader, what.columns):
        return replay.answers()


def _yardstick(task: Task, examples: Examples, whole: Outputs) -> Yardstick:
    if task.labelled and examples.labels is not None:
        labels = torch.from_numpy(np.ascontiguousarray(examples.labels))

        def loss(outputs: Outputs) -> Floats:
            answers = torch.from_numpy(outputs)
            each = [float(task.loss(answers[i : i + 1], labels[i : i + 1])) for i in range(len(labels))]
            return np.asarray(each, np.float64)

        def scores(outputs: Outputs) -> Floats:
            return task.scores(outputs, examples).astype(np.float64)

        return Yardstick("rise of the loss", loss, task.metric, scores)
    if not task.labelled:
        return Yardstick("1 - cosine", lambda outputs: _angle(outputs, whole), None, None)
    best = whole.argmax(-1)
    return Yardstick(
        "KL divergence",
        lambda outputs: _divergence(whole, outputs),
        "same answer",
        lambda outputs: (outputs.argmax(-1) == best).astype(np.float64),
    )


def _angle(one: Outputs, other: Outputs) -> Floats:
    """1 - cosine of each pair of rows, [n, width] -> [n]."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    found: Floats = 1.0 - (a * b).sum(-1) / np.maximum(norms, 1e-12)
    return found


def _divergence(whole: Outputs, other: Outputs) -> Floats:
    """KL(whole || other) of the softmax of logits [n, classes], in nats."""
    a, b = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (whole, other))
    found: Floats = (a.exp() * (a - b)).sum(-1).numpy()
    return found


def _whole(yardstick: Yardstick, whole: Outputs, examples: Examples) -> dict[str, float]:
    if examples.labels is None or yardstick.metric is None or yardstick.scores is None:
        return {}
    return {"loss": float(yardstick.costs(whole).mean()), yardstick.metric: float(yardstick.scores(whole).mean())}


def _judged(
    yardstick: Yardstick, whole: Outputs, told: list[dict[str, Any]], outputs: list[Outputs], seed: int
) -> Iterator[Part]:
    costs = spans(np.stack([yardstick.costs(one) for one in outputs]) - yardstick.costs(whole), seed)
    changes: list[Any] = [None] * len(outputs)
    if yardstick.scores is not None:
        changes[:] = spans(np.stack([yardstick.scores(one) for one in outputs]) - yardstick.scores(whole), seed)
    for part, cost, change in zip(told, costs, changes, strict=True):
        yield Part(**part, cost=cost, change=change)


def _ticker(progress: Progress, total: int) -> Callable[[int], None]:
    """A call tells how many blocks have run since the last one: parts of late blocks are quicker than those of early ones."""
    ticks = iter(progress.track(range(total), "sensitivity", total=total))
    next(ticks, None)

    def passed(count: int) -> None:
        for _ in range(count):
            next(ticks, None)

    return passed


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
