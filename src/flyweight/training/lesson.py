"""A teacher, what it is asked about, and a training on its answers: what distillation and quantization-aware training share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyweight.context import Context
from flyweight.data import Examples, join
from flyweight.errors import StepError
from flyweight.models.bundle import Bundle
from flyweight.models.surgery import blocks
from flyweight.settings import TeacherSettings, TrainSettings
from flyweight.training.device import find_device, placed, seeded
from flyweight.training.distillation import Imitation
from flyweight.training.loop import TrainResult, train
from flyweight.training.losses import projections
from flyweight.training.objective import Objective, keep_zeros
from flyweight.training.pair import check_fit, check_length, check_width, layer_map
from flyweight.training.predict import validation
from flyweight.training.teacher import answers, identity

__all__ = ["Lesson", "imitation", "open_teacher", "texts"]


def open_teacher(settings: TeacherSettings, context: Context) -> Bundle:
    """The teacher that the settings name. Raises StepError for one whose head was never trained."""
    teacher = context.reference() if settings.teacher == "reference" else context.load(settings.teacher)
    if teacher.fresh_head:
        raise StepError(f"a teacher with a head for {context.task.name}", "one without", "fine-tune the teacher first")
    return teacher


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


def imitation(
    student: Bundle, teacher: Bundle, settings: TeacherSettings, seed: int, given: tuple[int, ...] | None = None
) -> Imitation | None:
    """The hidden-state half, by the map `given` (see `layer_map`); None where it has no weight.

    Raises StepError where one of the two has several stacks of blocks.
    """
    if settings.hidden_weight == 0:
        return None
    depths = []
    for who in (student, teacher):
        stacks = blocks(who.model, who.family)
        if len(stacks) != 1:
            raise StepError("models with one stack of blocks for hidden_weight", ", ".join(stacks), "leave it out")
        depths += [len(stack) for stack in stacks.values()]
    teacher_layers = layer_map(given, *depths)
    with seeded(seed):
        widths = student.model.config.hidden_size, teacher.model.config.hidden_size
        maps = projections(depths[0], *widths)
    return Imitation(teacher, range(depths[0]), teacher_layers, maps)


@dataclass(frozen=True)
class Lesson:
    """parts: see `texts`; key: `identity(teacher)`"""

    parts: list[Examples]
    teacher: Bundle
    key: str
    settings: TeacherSettings
    context: Context

    @classmethod
    def of(
        cls, bundle: Bundle, student: Bundle, teacher: Bundle, settings: TeacherSettings, context: Context
    ) -> Lesson:
        """Raises StepError, before anything runs, where teacher, student, data and settings do not fit.

        bundle: the model at hand, whose tokenizer made the examples
        """
        parts = texts(settings, context)
        check_fit(bundle, student, teacher)
        for part in parts:
            check_length(part, student, teacher)
        if not context.task.labelled:
            check_width(student.model.config.hidden_size, teacher.model.config.hidden_size)
        return cls(parts, teacher, identity(teacher), settings, context)

    @property
    def examples(self) -> Examples:
        return self.parts[0] if len(self.parts) == 1 else join(*self.parts)

    @property
    def labelled(self) -> NDArray[np.bool_]:
        """Which of the examples have a label, [n] bool."""
        return np.concatenate([np.full(len(part), part.labels is not None) for part in self.parts])

    def targets(self) -> NDArray[np.float32] | None:
        """The teacher's answers to all examples; each file's are cached by themselves. None where alpha is 0."""
        if self.settings.alpha == 0 and self.context.task.labelled:
            return None
        return np.concatenate([self.ask(part) for part in self.parts])

    def ask(self, data: Examples) -> NDArray[np.float32]:
        context = self.context
        cache = context.teacher_cache or context.work / "teacher"
        return answers(self.teacher, self.key, data, cache, context.progress, context.device)

    def held_back(self) -> Examples | None:
        """Validation examples; where a task has no labels, with the teacher's answers in their place."""
        held = self.context.validation
        if held is None or not len(held) or self.context.task.labelled or held.labels is not None:
            return held
        return replace(held, labels=self.ask(held))

    def teacher_metric(self) -> float | None:
        held, task = self.held_back(), self.context.task
        if held is None or held.labels is None or not len(held):
            return None
        return task.metrics(self.ask(held), held)[task.metric]

    def run(
        self,
        student: Bundle,
        objective: Objective,
        settings: TrainSettings,
        what: str,
        folder: str,
        examples: Examples | None = None,
        key: Any = "",
    ) -> TrainResult:
        """Train the student, by default on all examples; pruned weights stay zero. The checkpoint is in the folder's name."""
        held, context = self.held_back(), self.context
        with keep_zeros(student.model, student.sparse), placed(self.teacher.model, find_device(context.device)):
            return train(
                student.model,
                objective,
                self.examples if examples is None else examples,
                settings,
                seed=context.seed,
                pad=student.encoder.pad,
                work=context.work / folder,
                evaluate=validation(student, held),
                progress=context.progress,
                device=context.device,
                what=what,
                key=f"{key}{'' if held is None else held.content_hash()}",
            )
