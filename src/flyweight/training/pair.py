"""Whether a teacher and its student go together, and which layers imitate which."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.models.bundle import Bundle

__all__ = [
    "check_fit",
    "check_length",
    "check_tokens",
    "check_top",
    "check_trained",
    "check_width",
    "layer_map",
    "same_tokens",
]


def layer_map(given: str | Sequence[int] | None, student_depth: int, teacher_depth: int) -> list[int]:
    """For each student layer the teacher layer it imitates.

    None or `uniform`: spread evenly, the last on the last: layer m of M on ceil((m + 1) * N / M) - 1 of N (TinyBERT's
    uniform map where M divides N). `last`: the last M of N (Sun et al. 2019, section 3). Raises StepError for a map of
    another length, a layer that the teacher has not, and `last` for a student that is deeper than its teacher.
    """
    if given is None or given == "uniform":
        return [-(-(m + 1) * teacher_depth // student_depth) - 1 for m in range(student_depth)]
    if given == "last":
        if student_depth > teacher_depth:
            raise StepError(
                f"a student of at most the teacher's {teacher_depth} layers for layer_map last",
                f"{student_depth}",
                "set layer_map to uniform",
            )
        return list(range(teacher_depth - student_depth, teacher_depth))
    if isinstance(given, str):
        raise StepError("layer_map uniform, last or a list of numbers", f"'{given}'")
    if len(given) != student_depth:
        raise StepError(f"{student_depth} numbers in layer_map, one a student layer", f"{len(given)}")
    wrong = [number for number in given if not 0 <= number < teacher_depth]
    if wrong:
        raise StepError(f"teacher layers from 0 to {teacher_depth - 1} in layer_map", f"{wrong[0]}")
    return list(given)


def check_fit(student: Bundle, teacher: Bundle) -> None:
    """Refuse a pair whose answers do not mean the same. Raises StepError naming both sizes."""
    if student.labels != teacher.labels:
        mine, theirs = (len(b.labels or ()) for b in (student, teacher))
        detail = f"teacher {_named(teacher.labels)}, student {_named(student.labels)}"
        raise StepError(
            f"a teacher with the student's {mine} labels in the student's order",
            f"one with {theirs} labels ({detail})",
            "train the teacher on the same labels",
        )


def check_trained(teacher: Bundle) -> None:
    """Raises StepError for a teacher whose head was made anew and never trained."""
    if teacher.fresh_head:
        raise StepError(f"a teacher with a head for {teacher.task}", "one without", "fine-tune the teacher first")


def check_width(student: int, teacher: int) -> None:
    """Without labels the answers themselves are compared. Raises StepError naming both widths."""
    if student != teacher:
        raise StepError(
            f"a student whose vectors have the teacher's width {teacher}", f"{student}", "choose another student"
        )


def check_top(k: int | None, teacher: Bundle) -> None:
    """Raises StepError for a top_k that the answers have not so many classes for."""
    if k is None:
        return
    if teacher.labels is None:
        raise StepError("a task with labels for top_k", f"'{teacher.task}'", "leave out top_k")
    if k > len(teacher.labels):
        raise StepError(
            f"a top_k of at most the teacher's {len(teacher.labels)} classes", f"{k}", "lower it or leave it out"
        )


def check_length(data: Examples, reader: Bundle) -> None:
    """Raises StepError when an example is longer than the model can read."""
    limit, longest = reader.encoder.max_length, int(np.max(data.lengths, initial=0))
    if longest > limit:
        raise StepError(
            f"examples of at most {limit} tokens, the limit of student and teacher",
            f"one of {longest}",
            f"set max_length to {limit} with truncate",
        )


def same_tokens(one: Bundle, other: Bundle) -> bool:
    """Whether two models read a text as the same numbers, by their vocabularies."""
    return _vocabulary(one) == _vocabulary(other)


def check_tokens(who: str, one: Bundle, whom: str, other: Bundle, inside: str = "") -> None:
    """Raises StepError naming both vocabularies where the tokens of two models are not the same.

    inside: settings that could be set to 0 instead; some are above it where nothing is said
    """
    mine, theirs = _vocabulary(one), _vocabulary(other)
    if mine == theirs:
        return
    same = sum(theirs.get(token) == number for token, number in mine.items())
    raise StepError(
        f"{who} to read the same tokens as {whom} ({len(theirs)} of them)",
        f"a vocabulary of {len(mine)}, {same} of which agree",
        f"set {inside} to 0: answers alone teach across vocabularies"
        if inside
        else "choose models that share a tokenizer",
    )


def _vocabulary(bundle: Bundle) -> dict[str, int]:
    found: dict[str, int] = bundle.encoder.tokenizer.get_vocab(with_added_tokens=True)
    return found


def _named(labels: Sequence[str] | None) -> str:
    some = ", ".join(map(repr, list(labels or ())[:5]))
    return f"[{some}{', ...' if len(labels or ()) > 5 else ''}]"
