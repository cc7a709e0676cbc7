"""Train a student to answer as its teacher does (Hinton et al. 2015; Jiao et al. 2020)."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.methods.distill.student import make_student
from flyweight.models.bundle import Bundle
from flyweight.settings import DistillSettings
from flyweight.training import TaskObjective, TrainResult, evaluating
from flyweight.training.distillation import Distillation
from flyweight.training.lesson import Lesson, imitation, open_teacher, texts

__all__ = ["distill"]


def distill(bundle: Bundle, settings: DistillSettings, context: Context) -> Bundle:
    """Make a student and train it on its teacher's answers, and on the labels where alpha is below 1.

    Returns the student; the teacher is left as it was, the model at hand may have become the student. Raises StepError
    at the start when teacher, student, data and settings do not fit, and what `flyweight.training.train` raises.
    """
    texts(settings, context)
    _check(settings, context)
    teacher = open_teacher(settings, context)
    student = make_student(bundle, settings, context, teacher)
    lesson = Lesson.of(bundle, student, teacher, settings, context)
    hidden = imitation(student, teacher, settings, context.seed, settings.layer_map)
    start = deepcopy(student.model) if settings.control else None

    targets = lesson.targets()
    objective = Distillation(
        student, settings, () if targets is None else (targets,), lesson.labelled, hidden, lesson.key
    )
    with evaluating(teacher.model):
        result = lesson.run(student, objective, settings, "distilling", "student")
    context.notes.update(result.notes())
    context.notes["teacher_metric"] = lesson.teacher_metric()
    if start is not None:
        context.notes["control"] = _control(lesson, replace(student, model=start), settings).notes()
    return replace(student, steps=bundle.steps, fresh_head=False)


def _check(settings: DistillSettings, context: Context) -> None:
    """Raises StepError for settings that belong together or need what is not there."""
    if settings.layer_map is not None and settings.hidden_weight == 0:
        raise StepError("a hidden_weight above 0 with layer_map", "0", "set hidden_weight, e.g. to 1")
    if not settings.control:
        return
    if not context.task.labelled:
        raise StepError(
            "a task with labels for a control run",
            f"'{context.task.name}'",
            "leave out control: nothing remains to learn",
        )
    if context.train is None or context.train.labels is None:
        raise StepError("labelled examples for control", "none", "give them with --train, or leave out control")


def _control(lesson: Lesson, student: Bundle, settings: DistillSettings) -> TrainResult:
    """The same start, seed and number of steps on the labels alone."""
    data = lesson.context.train
    assert data is not None  # `_check` refuses control without labels
    total = math.ceil(settings.epochs * math.ceil(len(lesson.examples) / settings.batch_size))
    steps = min(total, settings.max_steps or total)
    epochs = steps / math.ceil(len(data) / settings.batch_size)
    alone = settings.model_copy(
        update={"alpha": 0.0, "hidden_weight": 0.0, "epochs": math.ceil(epochs), "max_steps": max(steps, 1)}
    )
    return lesson.run(student, TaskObjective(student, alone), alone, "control without teacher", "control", data)
