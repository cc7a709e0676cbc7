"""What a training will take: its steps, its looks at the validation examples, its checkpoints, and what it holds meanwhile."""

from __future__ import annotations

import math
from typing import NamedTuple

from flyweight.measure.reading import Lengths, predicted, trained
from flyweight.measure.work import Rates, Work
from flyweight.settings import TrainSettings
from flyweight.training.loop import CHECKPOINT_SECONDS

__all__ = ["Pupil", "Trained", "training", "updates_of"]


class Pupil(NamedTuple):
    """What is trained. weights: how many; share: of the work of the model that was timed; saved: bytes a token kept for the way
    back"""

    weights: int
    share: float
    saved: float


class Trained(NamedTuple):
    """seconds; bytes beside the model"""

    seconds: float
    bytes: int


def updates_of(settings: TrainSettings, examples: int) -> int:
    total = math.ceil(settings.epochs * math.ceil(examples / settings.batch_size))
    return min(total, settings.max_steps or total)


def training(
    settings: TrainSettings, lengths: Lengths, validation: Lengths | None, pupil: Pupil, rates: Rates, beside: Work
) -> Trained:
    """beside: what else is done in the steps, such as asking a teacher."""
    updates = updates_of(settings, len(lengths))
    if not updates:
        return Trained(0.0, 0)
    per_epoch = math.ceil(len(lengths) / settings.batch_size)
    looks = math.ceil(updates * settings.evaluations_per_epoch / per_epoch)
    read = trained(lengths, settings.batch_size, updates)
    work = read.backward.times(pupil.share).plus(
        beside, Work(updates=updates * pupil.weights, hashed=4 * pupil.weights)
    )
    copies, held = 3, 2.0  # weights and two moments are written; the moments are held
    best = 0
    if validation is not None and len(validation):
        work = work.plus(predicted(validation).forward.times(looks * pupil.share))
        copies, best = 4, min(looks, 2)  # new best weights are copied before the old ones go
    saved = Work(stored=4 * copies * pupil.weights).takes(rates)
    seconds = work.takes(rates)
    seconds += saved * (looks + math.floor(seconds / looks / (CHECKPOINT_SECONDS + saved)) * looks)
    size = 4 * pupil.weights
    inside = int(pupil.saved * read.largest)
    stepping = max(inside, size) + (best > 0) * (looks > 1) * size  # gradients come as what was kept goes
    return Trained(seconds, int(held * size + max(stepping, best * size)))
