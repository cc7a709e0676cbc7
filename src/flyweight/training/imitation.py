"""What of a teacher's inside a student imitates: hidden states, embeddings, attention scores, relations; layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flyweight.errors import StepError
from flyweight.models.bundle import Bundle
from flyweight.models.stream import width_of
from flyweight.models.surgery import blocks, kept_heads, layout
from flyweight.settings import DistillSettings, TeacherSettings
from flyweight.training import losses
from flyweight.training.device import seeded
from flyweight.training.pair import layer_map
from flyweight.training.watch import Seen, one_stack, watch

__all__ = ["HeadPair", "Imitation", "Weights", "check_inside", "check_map", "head_pairs", "imitation"]


class Weights(NamedTuple):
    """Of the losses that look inside; 0 leaves one out."""

    hidden: float = 0.0
    embedding: float = 0.0
    attention: float = 0.0
    relation: float = 0.0

    @classmethod
    def of(cls, settings: TeacherSettings) -> Weights:
        if not isinstance(settings, DistillSettings):
            return cls(settings.hidden_weight)
        return cls(
            settings.hidden_weight, settings.embedding_weight, settings.attention_weight, settings.relation_weight
        )


class HeadPair(NamedTuple):
    """Positions of heads that are held against one another, in a student block and in its teacher block."""

    student: list[int]
    teacher: list[int]


@dataclass(frozen=True)
class Imitation:
    """Which student layers imitate which teacher layers, in what, through which maps.

    maps:   of hidden states, one a pair; empty where they have no weight
    weights: of the four losses
    entry:  the map of embeddings, or none
    heads:  which heads imitate which, one a pair; empty where attention scores have no weight
    relation_heads: slices that relations of the last pair are taken in
    """

    teacher: Bundle
    student_layers: Sequence[int]
    teacher_layers: Sequence[int]
    maps: nn.ModuleList
    weights: Weights
    entry: nn.ModuleList = field(default_factory=nn.ModuleList)
    heads: Sequence[HeadPair] = ()
    relation_heads: int = 1

    @property
    def learned(self) -> nn.ModuleList:
        """All maps."""
        return nn.ModuleList([*self.maps, *self.entry])

    def watch_student(self, student: Bundle) -> AbstractContextManager[Seen]:
        return self._watch(student, self.student_layers)

    def watch_teacher(self) -> AbstractContextManager[Seen]:
        return self._watch(self.teacher, self.teacher_layers)

    def _watch(self, bundle: Bundle, layers: Sequence[int]) -> AbstractContextManager[Seen]:
        attention: Sequence[int] = layers if self.weights.attention else layers[-1:] if self.weights.relation else ()
        hidden = layers if self.weights.hidden else ()
        return watch(bundle, hidden=hidden, attention=attention, embeddings=self.weights.embedding > 0)

    def loss(self, mine: Seen, theirs: Seen, mask: Tensor) -> Tensor:
        """The weighted sum; mask: [batch, length], 1 = a token."""
        weights, total = self.weights, torch.zeros((), device=mask.device)
        if weights.hidden:
            states = mine.states(self.student_layers), theirs.states(self.teacher_layers)
            total = total + weights.hidden * losses.hidden_states(*states, list(self.maps), mask)
        if weights.embedding:
            entry = losses.hidden_states([mine.entry], [theirs.entry], list(self.entry), mask)
            total = total + weights.embedding * entry
        if weights.attention:
            pairs = [
                one for one in zip(self.student_layers, self.teacher_layers, self.heads, strict=True) if one[2].student
            ]
            given = [mine.scores(layer)[:, pair.student] for layer, _, pair in pairs]
            wanted = [theirs.scores(layer)[:, pair.teacher] for _, layer, pair in pairs]
            total = total + weights.attention * losses.attention_scores(given, wanted, mask)
        if weights.relation:
            vectors = mine.vectors(self.student_layers[-1]), theirs.vectors(self.teacher_layers[-1])
            total = total + weights.relation * losses.relations(*vectors, mask, self.relation_heads)
        return total


def imitation(
    student: Bundle,
    teacher: Bundle,
    settings: TeacherSettings,
    seed: int,
    given: str | Sequence[int] | None = None,
    basis: Tensor | None = None,
) -> Imitation | None:
    """What the settings ask for, by the layer map `given` (see `layer_map`); None where no such loss has a weight.

    basis: [teacher width, student width], where the student's states stand for those of the teacher in this basis: learned
    maps begin there, and are drawn under `seed` otherwise.

    Raises StepError where one of the two has several stacks of blocks, for layers or heads that do not go together, and for
    relation heads that do not divide the widths.
    """
    weights = Weights.of(settings)
    if not any(weights):
        return None
    _check_stacks(student, teacher, weights)
    depths = [len(one_stack(who)[1]) for who in (student, teacher)]
    teacher_layers = layer_map(given, *depths)
    heads = head_pairs(student, teacher, teacher_layers) if weights.attention else ()
    slices = settings.relation_heads if isinstance(settings, DistillSettings) else 1
    if weights.relation:
        check_relation_heads(student, teacher, teacher_layers[-1], slices)
    return Imitation(
        teacher,
        range(depths[0]),
        teacher_layers,
        weights=weights,
        **_maps(student, teacher, weights, depths[0], seed, basis),
        heads=heads,
        relation_heads=slices,
    )


def check_inside(student: Bundle, teacher: Bundle, settings: DistillSettings, kept: Sequence[int]) -> None:
    """Refuse what `imitation` would, before the student is cut: kept are the numbers of the blocks that will be left of it, and
    settings.width its width. Raises StepError."""
    check_map(settings)
    weights = Weights.of(settings)
    if not any(weights):
        return
    _check_stacks(student, teacher, weights)
    layers = layer_map(settings.layer_map, len(kept), len(one_stack(teacher)[1]))
    if weights.attention:
        head_pairs(student, teacher, layers, kept)
    if weights.relation:
        check_relation_heads(student, teacher, layers[-1], settings.relation_heads, kept[-1], settings.width)


def check_map(settings: DistillSettings) -> None:
    """Raises StepError for a layer map that no loss has a use for."""
    if (
        settings.layer_map != "uniform"
        and not settings.hidden_weight + settings.attention_weight + settings.relation_weight
    ):
        raise StepError(
            "a hidden_weight above 0, or attention_weight or relation_weight, with layer_map",
            "none",
            "set hidden_weight, e.g. to 1",
        )


def _check_stacks(student: Bundle, teacher: Bundle, weights: Weights) -> None:
    named = " or ".join(f"{name}_weight" for name, value in weights._asdict().items() if value)
    for who in (student, teacher):
        stacks = blocks(who.model, who.family)
        if len(stacks) != 1:
            raise StepError(f"models with one stack of blocks for {named}", ", ".join(stacks), "leave it out")
        if (weights.attention or weights.relation) and "encoder" not in stacks:
            raise StepError("encoders for attention_weight and relation_weight", "a decoder", "leave them out")


def head_pairs(
    student: Bundle, teacher: Bundle, teacher_layers: Sequence[int], kept: Sequence[int] | None = None
) -> list[HeadPair]:
    """For each student block its heads and those of the teacher block that they imitate: the ones of the same number.

    kept: numbers of the student's blocks that count, by default all. Heads that were pruned away are missing in the student
    and are passed over in the teacher. Raises StepError where the two were not built with as many heads, and where the
    teacher block lacks one that the student has.
    """
    (row, mine), (other, theirs) = one_stack(student), one_stack(teacher)
    built = [getattr(who.model.config, stack.heads_key) for who, stack in ((student, row), (teacher, other))]
    hint = "use relation_weight, which needs no equal heads, or leave out attention_weight"
    if built[0] != built[1]:
        raise StepError(f"a student with the teacher's {built[1]} heads for attention_weight", f"{built[0]}", hint)
    found = []
    for number, layer in enumerate(teacher_layers):
        has = kept_heads(mine[number if kept is None else kept[number]], row.attention[0])
        there = kept_heads(theirs[layer], other.attention[0])
        if missing := sorted(set(has) - set(there)):
            raise StepError(
                f"the heads of student layer {number} in teacher layer {layer} for attention_weight",
                f"no head {missing[0]} there",
                hint,
            )
        found.append(HeadPair(list(range(len(has))), [there.index(head) for head in has]))
    if not any(pair.student for pair in found):
        raise StepError("a student with an attention for attention_weight", "none in any block", hint)
    return found


def check_relation_heads(
    student: Bundle, teacher: Bundle, teacher_layer: int, heads: int, last: int = -1, width: int | None = None
) -> None:
    """Raises StepError where they do not divide the vectors of the last student layer and of the teacher layer it imitates.

    last: number of that student layer; width: hidden width that the student will be cut to
    """
    (row, mine), (other, theirs) = one_stack(student), one_stack(teacher)
    widths = []
    size = None if width is None else width // getattr(student.model.config, row.heads_key)
    for block, stack, cut in ((mine[last], row, size), (theirs[teacher_layer], other, None)):
        sizes = layout(block, stack.attention[0])
        widths.append(sizes.units * (sizes.key if cut is None else cut))
    if 0 in widths:
        raise StepError("an attention in the last layers for relation_weight", "none", "leave out relation_weight")
    if any(width % heads for width in widths):
        both = f"the student's {widths[0]} and the teacher's {widths[1]}"
        fits = [n for n in range(1, min(widths) + 1) if not any(width % n for width in widths)]
        raise StepError(
            f"relation_heads that divide {both}",
            f"{heads}",
            f"set it to {', '.join(map(str, fits[-3:-1]))} or {fits[-1]}" if len(fits) > 1 else "set it to 1",
        )


def _maps(
    student: Bundle, teacher: Bundle, weights: Weights, depth: int, seed: int, basis: Tensor | None
) -> dict[str, nn.ModuleList]:
    widths = width_of(student), width_of(teacher)
    with seeded(seed):
        made = {
            "maps": losses.projections(depth if weights.hidden else 0, *widths),
            "entry": losses.projections(1 if weights.embedding else 0, *widths),
        }
    for module in (one for maps in made.values() for one in maps):
        if basis is not None and isinstance(module, nn.Linear):
            module.weight.data.copy_(basis)
    return made
