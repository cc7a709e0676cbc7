"""Train a student to answer as its teacher does (Hinton et al. 2015; Jiao et al. 2020)."""

from __future__ import annotations

import math
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace

from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.methods.distill.student import shaped, whole_student
from flyweight.models.bundle import Bundle
from flyweight.settings import DistillSettings
from flyweight.training import TaskObjective, TrainResult, evaluating, find_device, placed
from flyweight.training.distillation import Distillation
from flyweight.training.imitation import Imitation, check_map, imitation
from flyweight.training.lesson import Lesson, open_teachers, texts

__all__ = ["distill"]


def distill(bundle: Bundle, settings: DistillSettings, context: Context) -> Bundle:
    """Make a student and train it on its teachers' answers, and on the labels where alpha is below 1.

    Returns the student; the teachers are left as they were, the model at hand may have become the student. Raises StepError
    at the start when teachers, student, data and settings do not fit, and what `flyweight.training.train` raises.
    """
    texts(settings, context)
    _check(settings, context)
    teacher, *others = open_teachers(settings, context)
    student = whole_student(bundle, settings, context, teacher)
    lesson = Lesson.of(bundle, student, teacher, settings, context, others)
    student, basis = shaped(student, settings, context, lesson.examples)
    if settings.student is not None or settings.teacher != "reference":
        basis = None  # it is one of the student's own states, which those of this teacher have nothing to do with
    inside = imitation(student, teacher, settings, context.seed, settings.layer_map, basis)
    start = deepcopy(student.model) if settings.control else None

    result = _taught(lesson, student, settings, inside)
    context.notes.update(result.notes())
    context.notes["teacher_metric"] = lesson.teacher_metric()
    if start is not None:
        context.notes["control"] = _control(lesson, replace(student, model=start), settings).notes()
    return replace(student, steps=bundle.steps, fresh_head=False)


def _taught(lesson: Lesson, student: Bundle, settings: DistillSettings, inside: Imitation | None) -> TrainResult:
    """Train the student; teachers answer once before, or anew in every step where texts are changed."""
    live = lesson.live(settings.augment) if settings.augment else None
    weights = settings.teacher_weights or (1.0,) * (1 + len(lesson.others))
    objective = Distillation(
        student,
        settings,
        lesson.every_target() if live is None else (),
        lesson.labelled,
        inside,
        lesson.identity,
        shares=[weight / sum(weights) for weight in weights],
        live=live,
    )
    with ExitStack() as stack:
        stack.enter_context(evaluating(lesson.teacher.model))
        for other in lesson.others if live is not None else ():
            stack.enter_context(evaluating(other.model))
            stack.enter_context(placed(other.model, find_device(lesson.context.device)))
        return lesson.run(student, objective, settings, "distilling", "student")


def _check(settings: DistillSettings, context: Context) -> None:
    """Raises StepError for settings that belong together or need what is not there."""
    check_map(settings)
    if not context.task.labelled and (settings.kl != "forward" or settings.dist_weight or settings.mse_weight):
        raise StepError(
            "a task with labels for kl, dist_weight and mse_weight",
            f"'{context.task.name}'",
            "leave them out: vectors are compared by their cosine",
        )
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
    data = next((part for part in lesson.parts if part.labels is not None), None)
    assert data is not None  # `_check` refuses control without labels
    total = math.ceil(settings.epochs * math.ceil(len(lesson.examples) / settings.batch_size))
    steps = min(total, settings.max_steps or total)
    epochs = steps / math.ceil(len(data) / settings.batch_size)
    nothing = {"alpha": 0.0, "hidden_weight": 0.0, "embedding_weight": 0.0, "attention_weight": 0.0}
    nothing |= {"relation_weight": 0.0, "augment": 0.0}
    alone = settings.model_copy(update={**nothing, "epochs": math.ceil(epochs), "max_steps": max(steps, 1)})
    return lesson.run(student, TaskObjective(student, alone), alone, "control without teacher", "control", data)
