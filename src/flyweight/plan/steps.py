"""Seconds and bytes of every kind of step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flyweight.job import Job
from flyweight.measure.reading import Lengths
from flyweight.measure.work import NOTHING, Work
from flyweight.methods.distill import expected as distilling
from flyweight.methods.prune import expected as pruning
from flyweight.methods.prune.anatomy import Anatomy, anatomy_of
from flyweight.methods.quantize import expected as quantizing
from flyweight.models import surgery
from flyweight.plan.speed import Needs, Speed
from flyweight.plan.training import Pupil, Trained, training, updates_of
from flyweight.settings import DistillSettings, PruneSettings, QuantizeSettings, TeacherSettings, TrainSettings

__all__ = ["Cost", "Model", "cost", "needs", "share_left"]


class Cost(NamedTuple):
    """seconds of a step; bytes that it takes beside the model at hand"""

    seconds: float
    bytes: int


@dataclass(frozen=True)
class Model:
    """job: what is planned; speed: of its model; anatomy: of it as it is at the beginning"""

    job: Job
    speed: Speed
    anatomy: Anatomy

    @property
    def outside(self) -> int:
        """Weights outside of the blocks' linears."""
        return self.anatomy.weights - self.anatomy.inside

    def weights(self, share: float) -> int:
        """All weights when this share of the blocks is left."""
        return int(self.outside + share * self.anatomy.inside)


def needs(job: Job) -> Needs:
    """What has to be timed for the steps that are still to be done."""
    found = Needs()
    width = max((place.width for place in anatomy_of(job.bundle).places), default=0)
    for step in job.recipe.steps[job.done :]:
        settings = step.settings
        if isinstance(settings, QuantizeSettings):
            found = found._replace(training=found.training or settings.method == "train")
            continue
        learns = True
        if isinstance(settings, PruneSettings):
            learns = settings.gradual != "one-shot" or settings.restore == "block"
            if settings.criterion in ("fisher", "taylor") or settings.restore == "block":
                found = found._replace(gates=settings.target)
        found = found._replace(training=found.training or learns, width=width)
    return found


def share_left(model: Model, settings: object) -> float:
    """Share of the blocks' work that is left after the step."""
    if isinstance(settings, PruneSettings):
        return pruning.left_of(settings, model.anatomy).work
    if isinstance(settings, DistillSettings):
        layers = _layers(model)
        return distilling.student_share(settings, layers, model.anatomy.hidden)[0]
    return 1.0


def cost(model: Model, settings: object, before: float) -> Cost:
    """before: share of the blocks that earlier steps left."""
    if isinstance(settings, QuantizeSettings):
        sizes = _sizes(model, before)
        return Cost(*quantizing.expected(settings, model.job.recipe.accept, sizes))
    if isinstance(settings, PruneSettings):
        return _pruning(model, settings, before)
    if isinstance(settings, DistillSettings):
        return _distilling(model, settings, before)
    assert isinstance(settings, TrainSettings)
    found = _trained(model, settings, before, _parts(model, settings))
    return Cost(0.5 + found.seconds, found.bytes)


def _pruning(model: Model, settings: PruneSettings, before: float) -> Cost:
    splits = model.job.splits
    train, held, some = (
        None if one is None else one.lengths for one in (splits.train, splits.validation, splits.calibration)
    )
    labelled = model.job.task.labelled and splits.train is not None and splits.train.labels is not None
    known = pruning.Before(model.anatomy, pruning.Texts(train, held, some, labelled), model.speed.gate_saved)
    found = pruning.expected(settings, known)
    seconds, memory = 0.1 + found.work.times(before).takes(model.speed.rates), found.bytes
    if settings.gradual != "one-shot":
        lengths, beside = _parts(model, settings), NOTHING
        if settings.taught:
            weights = model.weights(before)
            updates = updates_of(settings, sum(map(len, lengths)))
            beside = distilling.asking(settings, lengths, _validation(model), updates, weights)
            memory += 4 * weights  # the teacher
        result = _trained(model, settings, before, lengths, beside)
        seconds, memory = seconds + result.seconds, memory + result.bytes
    return Cost(seconds, memory)


def _distilling(model: Model, settings: DistillSettings, before: float) -> Cost:
    """Teachers are as large as the model at the beginning, and so is a student that is named."""
    lengths = _parts(model, settings)
    whole, teacher = model.anatomy, model.weights(1.0)
    layers = _layers(model)
    share, width = distilling.student_share(settings, layers, whole.hidden)
    start = 1.0 if settings.student is not None else before
    weights = int(model.outside * width + start * share * whole.inside)
    updates = updates_of(settings, sum(map(len, lengths)))
    beside = distilling.asking(settings, lengths, _validation(model), updates, teacher)
    pupil = Pupil(weights, start * share, model.speed.saved * start * share)
    seconds = 0.5
    if settings.width is not None and settings.width < whole.hidden:
        some = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
        seconds += distilling.narrowing(some, _student(model), settings.width).takes(model.speed.rates)
    twice = (
        2 if settings.augment and settings.alpha < 1 else 1
    )  # changed texts for the teacher's half, others for the labels
    doubled = pupil._replace(share=pupil.share * twice, saved=pupil.saved * twice)
    result = _training(model, settings, lengths, doubled, beside)
    memory = result.bytes + 4 * teacher * len(settings.teachers)
    memory += 4 * weights * (settings.student is not None or width < 1)
    seconds += result.seconds
    if settings.control:
        seconds += _training(model, settings, lengths, pupil, NOTHING).seconds
        memory += 4 * weights
    return Cost(seconds, memory)


def _trained(
    model: Model, settings: TrainSettings, share: float, lengths: list[Lengths], beside: Work = NOTHING
) -> Trained:
    pupil = Pupil(model.weights(share), share, model.speed.saved * share)
    return _training(model, settings, lengths, pupil, beside)


def _training(model: Model, settings: TrainSettings, lengths: list[Lengths], pupil: Pupil, beside: Work) -> Trained:
    some = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    return training(settings, some, _validation(model), pupil, model.speed.rates, beside)


def _parts(model: Model, settings: TrainSettings) -> list[Lengths]:
    job = model.job
    found = [] if job.splits.train is None else [job.splits.train.lengths]
    if isinstance(settings, TeacherSettings) and settings.unlabelled is not None:
        found.append(job.unlabelled[settings.unlabelled].lengths)
    return found


def _validation(model: Model) -> Lengths | None:
    held = model.job.splits.validation
    return None if held is None else held.lengths


def _layers(model: Model) -> int:
    return len(model.anatomy.blocks)


def _student(model: Model) -> distilling.Student:
    block = model.anatomy.blocks[0]
    heads = next((place for place in block if place.what == "heads"), block[-1])
    return distilling.Student(model.anatomy.hidden, _layers(model), heads.units, heads.size, block[-1].width)


def _sizes(model: Model, share: float) -> quantizing.Sizes:
    """What the expected cost of a quantize step is told from; share: of the blocks' work that is left by then."""
    bundle, splits, speed = model.job.bundle, model.job.splits, model.speed
    shapes = [tuple(surgery.weight_2d(one).shape) for one in surgery.linears(bundle.model, bundle.family).values()]
    kept = [(round(rows * share), width) for rows, width in shapes]
    tables = sum(surgery.weight_2d(one).numel() for one in surgery.embeddings(bundle.model, bundle.family).values())
    return quantizing.Sizes(
        forward=speed.forward * share,
        training=speed.training * share,
        length=float(speed.length),
        linears=kept,
        blocks=_layers(model),
        weights=tables + sum(rows * width for rows, width in kept),
        model=model.anatomy.weights,
        texts=len(splits.calibration) if splits.calibration is not None else 0,
        train=len(splits.train) if splits.train is not None else 0,
        validation=len(splits.validation) if splits.validation is not None else 0,
    )
