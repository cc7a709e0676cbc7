"""Which model learns, which layers imitate which, and whether the two fit together at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flyweight.context import Context
from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.models.bundle import Bundle
from flyweight.models.surgery import blocks, keep_layers_of
from flyweight.settings import DistillSettings

__all__ = ["check_fit", "check_length", "check_width", "kept_layers", "layer_map", "make_student"]


def make_student(bundle: Bundle, settings: DistillSettings, context: Context, teacher: Bundle) -> Bundle:
    """The model that learns: `student`'s folder or the model at hand, with the layers that `layers` keeps.

    The teacher is left whole. Raises StepError for layers that do not exist.
    """
    student = bundle if settings.student is None else context.load(settings.student)
    if student.quantized:
        raise StepError(
            "a student with float weights",
            f"{len(student.quantized)} quantized ones",
            "distil before quantizing: training packed weights needs quantization-aware training",
        )
    keep = {
        stack: kept_layers(settings.layers, len(layers))
        for stack, layers in blocks(student.model, student.family).items()
    }
    if student.model is teacher.model:
        student = student.copy()
    if settings.layers != "all":
        keep_layers_of(student, keep)
    return student


def kept_layers(layers: str | Sequence[int], depth: int) -> list[int]:
    """Numbers of the layers to keep of `depth`. Raises StepError for one that does not exist or stands out of order."""
    if layers == "all":
        return list(range(depth))
    if layers == "every-other":
        return list(range(0, depth, 2))
    found = [int(number) for number in layers]
    wrong = [number for number in found if not 0 <= number < depth]
    if wrong or not found:
        got = f"layer {wrong[0]}" if wrong else "an empty list"
        raise StepError(f"layers from 0 to {depth - 1}", got, "mend `layers`")
    if found != sorted(set(found)):
        raise StepError("layers in rising order, each once", f"{found}", "mend `layers`")
    return found


def layer_map(given: Sequence[int] | None, student_depth: int, teacher_depth: int) -> list[int]:
    """For each student layer the teacher layer it imitates.

    By default spread evenly, the last on the last: layer m of M on ceil((m + 1) * N / M) - 1 of N (TinyBERT's uniform
    map where M divides N). Raises StepError for a map of another length or a layer that the teacher has not.
    """
    if given is None:
        return [-(-(m + 1) * teacher_depth // student_depth) - 1 for m in range(student_depth)]
    if len(given) != student_depth:
        raise StepError(f"{student_depth} numbers in layer_map, one a student layer", f"{len(given)}")
    wrong = [number for number in given if not 0 <= number < teacher_depth]
    if wrong:
        raise StepError(f"teacher layers from 0 to {teacher_depth - 1} in layer_map", f"{wrong[0]}")
    return list(given)


def check_fit(bundle: Bundle, student: Bundle, teacher: Bundle) -> None:
    """Refuse a pair whose inputs or outputs do not mean the same. Raises StepError naming both sizes.

    bundle: the model at hand, whose tokenizer made the examples
    """
    _same_vocabulary("the student", student, "the teacher", teacher)
    _same_vocabulary("the student", student, "the model at hand", bundle)
    if student.labels != teacher.labels:
        mine, theirs = (len(b.labels or ()) for b in (student, teacher))
        detail = f"teacher {_named(teacher.labels)}, student {_named(student.labels)}"
        raise StepError(
            f"a teacher with the student's {mine} labels in the student's order",
            f"one with {theirs} labels ({detail})",
            "train the teacher on the same labels",
        )


def check_width(student: int, teacher: int) -> None:
    """Without labels the answers themselves are compared. Raises StepError naming both widths."""
    if student != teacher:
        raise StepError(
            f"a student whose vectors have the teacher's width {teacher}", f"{student}", "choose another student"
        )


def check_length(data: Examples, student: Bundle, teacher: Bundle) -> None:
    """Raises StepError when an example is longer than either model can read."""
    limit = min(student.encoder.max_length, teacher.encoder.max_length)
    longest = int(np.max(data.lengths, initial=0))
    if longest > limit:
        raise StepError(
            f"examples of at most {limit} tokens, the limit of student and teacher",
            f"one of {longest}",
            f"set max_length to {limit} with truncate",
        )


def _same_vocabulary(who: str, one: Bundle, whom: str, other: Bundle) -> None:
    mine, theirs = (bundle.encoder.tokenizer.get_vocab(with_added_tokens=True) for bundle in (one, other))
    if mine == theirs:
        return
    same = sum(theirs.get(token) == number for token, number in mine.items())
    raise StepError(
        f"{who} to read the same tokens as {whom} ({len(theirs)} of them)",
        f"a vocabulary of {len(mine)}, {same} of which agree",
        "choose models that share a tokenizer",
    )


def _named(labels: Sequence[str] | None) -> str:
    some = ", ".join(map(repr, list(labels or ())[:5]))
    return f"[{some}{', ...' if len(labels or ()) > 5 else ''}]"
