"""A teacher, what it is asked about, and a training on its answers: what distillation and quantization-aware training share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from flyweight.context import Context
from flyweight.data import Examples, join
from flyweight.errors import StepError
from flyweight.models.bundle import Bundle
from flyweight.settings import DistillSettings, TeacherSettings, TrainSettings
from flyweight.training.augment import Changes
from flyweight.training.checkpoint import content_hash
from flyweight.training.device import find_device, placed
from flyweight.training.distillation import Live, Terms
from flyweight.training.imitation import imitation
from flyweight.training.loop import TrainResult, train
from flyweight.training.objective import Objective, keep_zeros
from flyweight.training.pair import (
    check_fit,
    check_length,
    check_tokens,
    check_top,
    check_trained,
    check_width,
    same_tokens,
)
from flyweight.training.predict import validation
from flyweight.training.teacher import Top, answers, identity, top_answers

__all__ = ["Lesson", "imitation", "open_teacher", "open_teachers", "texts"]

Kept = TypeVar("Kept")


def open_teacher(settings: TeacherSettings, context: Context) -> Bundle:
    """The teacher that the settings name. Raises StepError for one whose head was never trained."""
    teacher = context.reference() if settings.teacher == "reference" else context.load(settings.teacher)
    check_trained(teacher)
    return teacher


def open_teachers(settings: TeacherSettings, context: Context) -> list[Bundle]:
    """All teachers, `teacher` first. Raises as `open_teacher` does."""
    return [open_teacher(settings.model_copy(update={"teacher": name}), context) for name in settings.teachers]


def texts(settings: TeacherSettings, context: Context) -> list[Examples]:
    """Training examples, then those without labels. Raises StepError for none, or where the loss asks for missing labels."""
    parts = [part for part in (context.train, context.unlabelled) if part is not None and len(part)]
    if not parts:
        raise StepError("texts to learn from", "none", "give some with --train or --unlabelled")
    if not context.task.labelled:
        return [replace(part, labels=None) for part in parts]
    if settings.alpha < 1 and (context.train is None or context.train.labels is None):
        raise StepError(
            f"labelled examples for alpha {settings.alpha:g}", "none", "give them with --train, or set alpha to 1"
        )
    return parts


class Asked(NamedTuple):
    """A teacher, its `identity`, and the texts of a lesson in its own tokens."""

    teacher: Bundle
    key: str
    parts: list[Examples]
    held: Examples | None


@dataclass(frozen=True)
class Lesson:
    """parts: see `texts`; held: validation examples, or None; both in the student's tokens. asked: all teachers in order"""

    parts: list[Examples]
    held: Examples | None
    asked: tuple[Asked, ...]
    settings: TeacherSettings
    context: Context

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        student: Bundle,
        teacher: Bundle,
        settings: TeacherSettings,
        context: Context,
        others: Sequence[Bundle] = (),
    ) -> Lesson:
        """Raises StepError, before anything runs, where teachers, student, data and settings do not fit.

        bundle: the model at hand, whose tokenizer made the examples. Whoever reads other tokens gets them read anew.
        """

        def seen_by(who: str, one: Bundle) -> Context:
            if same_tokens(one, bundle):
                return context
            if context.reread is None:
                check_tokens(who, one, "the model at hand", bundle)
            return context.seen_by(one)

        own = seen_by("the student", student)
        parts, asked = texts(settings, own), []
        for one in (teacher, *others):
            check_fit(student, one)
            if settings.inside:
                check_tokens("the student", student, f"the teacher for {settings.inside}", one, settings.inside)
            theirs = own if same_tokens(one, student) else seen_by("the teacher", one)
            asked.append(Asked(one, identity(one), texts(settings, theirs), theirs.validation))
            for reader, some in ((student, parts), (one, asked[-1].parts)):
                for part in some:
                    check_length(part, reader)
            if not context.task.labelled:
                check_width(student.model.config.hidden_size, one.model.config.hidden_size)
        if isinstance(settings, DistillSettings):
            check_top(settings.top_k, teacher)
        return cls(parts, own.validation, tuple(asked), settings, context)

    @property
    def teacher(self) -> Bundle:
        return self.asked[0].teacher

    @property
    def others(self) -> list[Bundle]:
        return [one.teacher for one in self.asked[1:]]

    @property
    def identity(self) -> str:
        """Of all teachers together."""
        first, *others = (one.key for one in self.asked)
        return content_hash(first, others) if others else first

    @property
    def examples(self) -> Examples:
        return self.parts[0] if len(self.parts) == 1 else join(*self.parts)

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which of the examples have a label, [n] bool."""
        return np.concatenate([np.full(len(part), part.labels is not None) for part in self.parts])

    def targets(self) -> NDArray[np.float32] | None:
        """The first teacher's answers to all examples; each file's are cached by themselves. None where alpha is 0."""
        if self.settings.alpha == 0 and self.context.task.labelled:
            return None
        return np.concatenate([self._ask(answers, self.asked[0], part) for part in self.asked[0].parts])

    def every_target(self) -> list[NDArray[np.float32] | Top]:
        """One entry a teacher, as the settings want them kept; empty where answers are not compared."""
        settings = self.settings
        if self.context.task.labelled and not (settings.alpha > 0 and Terms.of(settings)):
            return []
        k = settings.top_k if isinstance(settings, DistillSettings) else None
        found: list[NDArray[np.float32] | Top] = []
        for one in self.asked:
            if k is None:
                found.append(np.concatenate([self._ask(answers, one, part) for part in one.parts]))
            else:
                kept = partial(top_answers, k=k, temperature=settings.temperature)
                found.append(Top.join([self._ask(kept, one, part) for part in one.parts]))
        return found

    def live(self, rate: float) -> Live:
        """All teachers, to be asked about texts changed at this rate."""
        return Live([self.teacher, *self.others], Changes.of(rate, self.context.seed, self.examples, self.teacher))

    def _ask(self, how: Callable[..., Kept], one: Asked, data: Examples) -> Kept:
        context = self.context
        cache = context.teacher_cache or context.work / "teacher"
        return how(one.teacher, one.key, data, cache, context.progress, context.device)

    def held_back(self) -> Examples | None:
        """Validation examples; where a task has no labels, with the teacher's answers in their place."""
        held = self.held
        if held is None or not len(held) or self.context.task.labelled or held.labels is not None:
            return held
        return replace(held, labels=self._of_held())

    def teacher_metric(self) -> float | None:
        held, task = self.held_back(), self.context.task
        if held is None or held.labels is None or not len(held):
            return None
        return task.metrics(self._of_held(), held)[task.metric]

    def _of_held(self) -> NDArray[np.float32]:
        """The first teacher's answers to the validation examples."""
        first = self.asked[0]
        assert first.held is not None  # the student's are the same texts
        return self._ask(answers, first, first.held)

    def run(
        self,
        student: Bundle,
        objective: Objective,
        settings: TrainSettings,
        what: str,
        folder: str,
        examples: Examples | None = None,
        key: Any = "",
        ready: Callable[[], bool] | None = None,
    ) -> TrainResult:
        """Train the student, by default on all examples; pruned weights stay zero. The checkpoint is in the folder's name.

        ready: whether weights of now may be the best; where not, they are not measured
        """
        held, context = self.held_back(), self.context
        measure = validation(student, held)

        def judge() -> float:
            assert measure is not None
            return measure() if ready is None or ready() else math.nan

        with keep_zeros(student.model, student.sparse), placed(self.teacher.model, find_device(context.device)):
            return train(
                student.model,
                objective,
                self.examples if examples is None else examples,
                settings,
                seed=context.seed,
                pad=student.encoder.pad,
                work=context.work / folder,
                evaluate=None if measure is None else judge,
                progress=context.progress,
                device=context.device,
                what=what,
                key=f"{key}{'' if held is None else held.content_hash()}",
            )
