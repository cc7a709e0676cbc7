"""What making a student and asking teachers will take, before it runs; its training is counted as every training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flyweight.measure.reading import Lengths, Read, predicted, trained
from flyweight.measure.work import Work
from flyweight.methods.distill.width import TEXTS
from flyweight.settings import DistillSettings, TeacherSettings

__all__ = ["Student", "asking", "narrowing", "student_share"]

PASSES = 2  # over the texts that a narrower student is made by: what is read, then the norms
SINGULAR = 30.0  # operations times N^3 of the singular values and eigenvalues of an [N, N] matrix


class Student(NamedTuple):
    """Of the model that is cut. hidden: its width; blocks, heads: how many; head: columns of one"""

    hidden: int
    blocks: int
    heads: int
    head: int
    neurons: int


def student_share(settings: DistillSettings, layers: int, hidden: int) -> tuple[float, float]:
    """(share of the blocks' work that the student keeps, share of its width)."""
    kept = 1.0
    if settings.layers == "every-other":
        kept = (layers + 1) // 2 / max(layers, 1)
    elif not isinstance(settings.layers, str):
        kept = min(1.0, len(settings.layers) / max(layers, 1))
    width = min((settings.width or hidden) / max(hidden, 1), 1.0)
    return kept * width, width


def narrowing(lengths: Lengths, model: Student, width: int) -> Work:
    """Moments of what is read at every place, then small matrices for every head."""
    read = predicted(lengths[:TEXTS])
    places, wide = 2 * model.blocks + 1, model.hidden
    new = max(width // max(model.heads, 1), 1)
    found = read.forward.times(PASSES).plus(
        Work(wide=2 * places * read.tokens * wide**2, products=2 * 2 * places * read.tokens * wide * width),
        Work(wide=SINGULAR * wide**3, roots=places * width**3 / 3),
    )
    solved = Work(
        wide=places * (4 * wide**2 * width + 4 * wide * width**2 + 2 * width**3) + 8 * model.blocks * wide**2 * width
    )
    solved = solved.plus(Work(wide=4 * model.blocks * model.neurons * wide * width))
    a_head = Work(
        wide=6 * width**3 + SINGULAR * model.head**3 + 20 * width * model.head * (model.head + new), calls=500.0
    )
    return found.plus(solved, a_head.times(model.blocks * model.heads))


def asking(
    settings: TeacherSettings, parts: Sequence[Lengths], validation: Lengths | None, updates: float, weights: int
) -> Work:
    """All that teachers as large as the model at hand are asked, of `weights` weights each.

    parts: training examples, further texts; updates: of the training
    """
    augmented = isinstance(settings, DistillSettings) and settings.augment > 0
    count = len(settings.teachers)
    found = Work(hashed=4 * weights * count)
    if validation is not None:
        found = found.plus(predicted(validation).forward)
    whole = [length for part in parts for length in part.tolist()]
    live = _live(parts, settings, updates)
    if augmented:
        return found.plus(live.forward.times(count))
    asked = settings.alpha > 0
    for part in parts:
        found = found.plus(predicted(part).forward.times(count if asked else 0))
    inside = settings.inside or (settings.taught and settings.hidden_weight)
    return found.plus(live.forward) if inside and whole else found


def _live(parts: Sequence[Lengths], settings: TeacherSettings, updates: float) -> Read:
    import numpy as np

    together = np.concatenate(list(parts)) if parts else np.zeros(0, np.int64)
    return trained(together, settings.batch_size, updates)
