"""Train a student to answer as its teacher does (Hinton et al. 2015; Jiao et al. 2020)."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyweight.context import Context
from flyweight.data import Examples, join
from flyweight.errors import StepError
from flyweight.methods.distill.losses import projections
from flyweight.methods.distill.objective import Distillation, Imitation
from flyweight.methods.distill.student import check_fit, check_length, check_width, layer_map, make_student
from flyweight.methods.distill.teacher import answers, identity
from flyweight.models.bundle import Bundle
from flyweight.models.surgery import blocks
from flyweight.settings import DistillSettings
from flyweight.training import (
    TaskObjective,
    TrainResult,
    evaluating,
    find_device,
    keep_zeros,
    placed,
    seeded,
    train,
    validation,
)

__all__ = ["distill"]


def distill(bundle: Bundle, settings: DistillSettings, context: Context) -> Bundle:
    """Make a student and train it on its teacher's answers, and on the labels where alpha is below 1.

    Returns the student; the teacher is left as it was, the model at hand may have become the student. Raises StepError
    at the start when teacher, student, data and settings do not fit, and what `flyweight.training.train` raises.
    """
    data = _data(settings, context)
    teacher = context.reference() if settings.teacher == "reference" else context.load(settings.teacher)
    if teacher.fresh_head:
        raise StepError(f"a teacher with a head for {context.task.name}", "one without", "fine-tune the teacher first")
    student = make_student(bundle, settings, context, teacher)
    check_fit(bundle, student, teacher)
    check_length(data.examples, student, teacher)
    if not context.task.labelled:
        check_width(student.model.config.hidden_size, teacher.model.config.hidden_size)
    imitation = _imitation(student, teacher, settings, context.seed)
    lesson = _Lesson(data, teacher, identity(teacher), settings, context)
    start = deepcopy(student.model) if settings.control else None

    objective = Distillation(student, settings, lesson.targets(), data.labelled, imitation, lesson.key)
    with evaluating(teacher.model), placed(teacher.model, find_device(context.device)):
        result = lesson.run(student, objective, data.examples, settings, "distilling", "student")
    context.notes.update(result.notes())
    context.notes["teacher_metric"] = lesson.teacher_metric()
    if start is not None:
        control = replace(student, model=start)
        context.notes["control"] = lesson.control(control).notes()
    return replace(student, steps=bundle.steps, fresh_head=False)


@dataclass(frozen=True)
class _Data:
    """Labelled examples first, then those without; labelled: [n] bool."""

    examples: Examples
    labelled: NDArray[np.bool_]


def _data(settings: DistillSettings, context: Context) -> _Data:
    """Raises StepError where the loss asks for labels that are not there."""
    parts = [part for part in (context.train, context.unlabelled) if part is not None and len(part)]
    if not parts:
        raise StepError("texts to distil on", "none", "give some with --train or --unlabelled")
    has_labels = context.train is not None and context.train.labels is not None
    if not context.task.labelled:
        if settings.control:
            raise StepError(
                "a task with labels for a control run",
                f"'{context.task.name}'",
                "leave out control: nothing remains to learn",
            )
        parts = [replace(part, labels=None) for part in parts]
    elif not has_labels and (settings.alpha < 1 or settings.control):
        need = "control" if settings.alpha == 1 else f"alpha {settings.alpha:g}"
        raise StepError(
            f"labelled examples for {need}", "none", "give them with --train, or set alpha to 1 without control"
        )
    examples = parts[0] if len(parts) == 1 else join(*parts)
    count = len(context.train) if has_labels and context.train is not None else 0
    return _Data(examples, np.arange(len(examples)) < count)


def _imitation(student: Bundle, teacher: Bundle, settings: DistillSettings, seed: int) -> Imitation | None:
    if settings.hidden_weight == 0:
        if settings.layer_map is not None:
            raise StepError("a hidden_weight above 0 with layer_map", "0", "set hidden_weight, e.g. to 1")
        return None
    depths = []
    for who in (student, teacher):
        stacks = blocks(who.model, who.family)
        if len(stacks) != 1:
            raise StepError("models with one stack of blocks for hidden_weight", ", ".join(stacks), "leave it out")
        depths += [len(stack) for stack in stacks.values()]
    teacher_layers = layer_map(settings.layer_map, *depths)
    with seeded(seed):
        widths = student.model.config.hidden_size, teacher.model.config.hidden_size
        maps = projections(depths[0], *widths)
    return Imitation(teacher, range(depths[0]), teacher_layers, maps)


@dataclass(frozen=True)
class _Lesson:
    """What the training with the teacher and the one without share."""

    data: _Data
    teacher: Bundle
    key: str
    settings: DistillSettings
    context: Context

    def targets(self) -> NDArray[np.float32] | None:
        """The teacher's answers to all examples; each file's are cached by themselves."""
        if self.settings.alpha == 0 and self.context.task.labelled:
            return None
        parts = [part for part in (self.context.train, self.context.unlabelled) if part is not None and len(part)]
        return np.concatenate([self._ask(part) for part in parts])

    def _ask(self, data: Examples) -> NDArray[np.float32]:
        context = self.context
        cache = context.teacher_cache or context.work / "teacher"
        return answers(self.teacher, self.key, data, cache, context.progress, context.device)

    def _validation(self) -> Examples | None:
        """Held-back examples; where a task has no labels, with the teacher's answers in their place."""
        held = self.context.validation
        if held is None or not len(held) or self.context.task.labelled or held.labels is not None:
            return held
        return replace(held, labels=self._ask(held))

    def teacher_metric(self) -> float | None:
        held, task = self._validation(), self.context.task
        if held is None or held.labels is None or not len(held):
            return None
        return task.metrics(self._ask(held), held)[task.metric]

    def run(
        self, student: Bundle, objective: Any, examples: Examples, settings: DistillSettings, what: str, folder: str
    ) -> TrainResult:
        held, context = self._validation(), self.context
        with keep_zeros(student.model, student.sparse):
            return train(
                student.model,
                objective,
                examples,
                settings,
                seed=context.seed,
                pad=student.encoder.pad,
                work=context.work / folder,
                evaluate=validation(student, held),
                progress=context.progress,
                device=context.device,
                what=what,
                key="" if held is None else held.content_hash(),
            )

    def control(self, student: Bundle) -> TrainResult:
        """The same start, seed and number of steps on the labels alone."""
        settings, train_data = self.settings, self.context.train
        assert train_data is not None  # `_data` refuses control without labels
        total = math.ceil(settings.epochs * math.ceil(len(self.data.examples) / settings.batch_size))
        steps = min(total, settings.max_steps or total)
        epochs = steps / math.ceil(len(train_data) / settings.batch_size)
        alone = settings.model_copy(
            update={"alpha": 0.0, "hidden_weight": 0.0, "epochs": math.ceil(epochs), "max_steps": max(steps, 1)}
        )
        return self.run(student, TaskObjective(student, alone), train_data, alone, "control without teacher", "control")
