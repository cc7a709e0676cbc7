"""Quantization-aware training: the model learns, from a float teacher, to answer with rounded weights and inputs.

The float weights are trained; every forward pass sees them rounded as their codes will be, by the quantizers of `lsq.py`
(gradients straight through), and sees inputs of linears as the engine will. So the model that is evaluated in training is the
one that the codes stand for. Linears of the blocks train on the step's grid, those outside them (heads) on theirs of 8 bits,
both with learned scales. Tables train too: what is looked up is rounded to the grid nearest to the row as it stands.
Norms, biases and whatever `skip` names train in float. Pruned weights stay zero.

`step_down` does it in stages of fewer and fewer bits. Each begins with the weights of the one before, finds its scales anew,
and has that model as a second teacher: both teachers' answers count one half. Stages before the last use the symmetric
grid where the last one is ternary or binary; at 2 bits that is -s, 0, s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import linear

from flyweight.calibration import walk
from flyweight.errors import StepError
from flyweight.methods.quantize.grid import quantize_weight
from flyweight.methods.quantize.lsq import InputQuantizer, WeightQuantizer, round_input, round_rows
from flyweight.methods.quantize.work import widest
from flyweight.models import surgery
from flyweight.training import evaluating, find_device, placed, predict
from flyweight.training.distillation import Distillation
from flyweight.training.lesson import Lesson, imitation, open_teacher

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.methods.quantize.work import Target, Work
    from flyweight.models.bundle import Codes
    from flyweight.settings import QuantizeSettings

__all__ = ["Fake", "fake_quantized", "train_aware"]

SCALE_RATE = 10.0
"""Learning rate of log-scales in those of the weights: both then move by a like share of their size."""
CALIBRATED = 128  # texts that static input grids begin with


@dataclass
class Fake:
    """What stands for what while the model trains.

    weights: {parameter name: quantizer} of linears; tables have none
    inputs:  {parameter name: quantizer} of static inputs; linears that read one tensor share one
    """

    targets: Sequence[Target]
    activations: str
    weights: dict[str, WeightQuantizer] = field(default_factory=dict)
    inputs: dict[str, InputQuantizer] = field(default_factory=dict)

    def parameters(self) -> list[nn.Parameter]:
        scales = [p for one in self.weights.values() for p in one.parameters()]
        grids = [p for one in self.inputs.values() for p in one.parameters()]
        return list({id(parameter): parameter for parameter in (*scales, *grids)}.values())

    def codes(self, target: Target) -> Codes:
        """What the model's weight stands for as it is now."""
        weight, transposed = surgery.weight_2d(target.owner).detach(), target.transposed
        if target.parameter not in self.weights:
            return quantize_weight(weight, target.grid, transposed=transposed)
        codes = self.weights[target.parameter].codes(weight, transposed)
        if target.parameter not in self.inputs:
            return codes
        scale, zero_point = self.inputs[target.parameter].grid()
        return replace(codes, input_scale=scale, input_zero_point=zero_point)


def train_aware(work: Work) -> None:
    """Train the model, then put codes for all targets.

    Raises StepError, with the model as it was, where teacher, texts and settings do not fit, and what
    `flyweight.training.train` raises.
    """
    for target in work.targets.values():
        work.take_back(target)
        work.floats.setdefault(target.parameter, work.weight(target).to("cpu", copy=True))
    teacher = open_teacher(work.settings, work.context)
    if teacher.model is work.bundle.model:
        teacher = teacher.copy()
    lesson = Lesson.of(work.bundle, work.bundle, teacher, work.settings, work.context)
    shares = _shares(lesson, work.settings)
    fake = _begin(work)
    with evaluating(teacher.model):
        work.notes.update(_train(work, lesson, fake, shares))
    work.notes["teacher_metric"] = lesson.teacher_metric()
    for target in work.targets.values():
        work.put(target, fake.codes(target))


def _stages(settings: QuantizeSettings) -> list[QuantizeSettings]:
    """One a width; what comes before a ternary or binary grid is symmetric."""
    scheme = "asymmetric" if settings.scheme == "asymmetric" else "symmetric"
    wider = [settings.model_copy(update={"bits": bits, "scheme": scheme}) for bits in settings.step_down[:-1]]
    return [*wider, settings]


def _shares(lesson: Lesson, settings: QuantizeSettings) -> list[int]:
    """Optimizer steps of every stage, at least one: as 1 / bits, since fewer bits take longer; the remainder to the last."""
    total = math.ceil(settings.epochs * math.ceil(len(lesson.examples) / settings.batch_size))
    total = min(total, settings.max_steps or total)
    widths = settings.step_down or (settings.bits,)
    if total < len(widths) and len(widths) > 1:
        raise StepError(
            f"at least {len(widths)} steps for step_down, one a stage", f"{total}", "raise epochs or max_steps"
        )
    parts = [1 / bits for bits in widths[:-1]]
    whole = sum(parts) + 1 / widths[-1]
    shares = [max(1, int(total * part / whole)) for part in parts]
    return [*shares, total - sum(shares)]


def _begin(work: Work) -> Fake:
    """Quantizers of what all stages share: heads and static inputs."""
    targets = list(work.targets.values())
    fake = Fake(targets, work.settings.activations)
    for target in work.of("head"):
        fake.weights[target.parameter] = WeightQuantizer.begin(work.weight(target), target.grid, work.mask(target))
    if work.settings.activations == "static":
        texts = work.context.calibration or work.context.train or work.context.unlabelled
        assert texts is not None  # the lesson has refused this
        some = texts.take(np.arange(min(len(texts), CALIBRATED)))
        for block in walk(work.bundle, some, work.context.progress):
            for site in block.sites:
                quantizer = InputQuantizer.begin(torch.cat(list(block.stream(site))))
                fake.inputs |= {target.parameter: quantizer for target in work.at(site)}
    return fake


def _train(work: Work, lesson: Lesson, fake: Fake, shares: Sequence[int]) -> dict[str, Any]:
    """All stages; returns the notes of the last one, and of those before it under `stages`."""
    first = lesson.targets()
    former: NDArray[np.float32] | None = None
    notes: list[dict[str, Any]] = []
    stages = _stages(work.settings)
    masks = {target.parameter: work.mask(target) for target in work.of("block")}
    hidden = imitation(work.bundle, lesson.teacher, work.settings, work.context.seed)
    for number, (stage, count) in enumerate(zip(stages, shares, strict=True)):
        for target in work.of("block"):
            grid = target.grid._replace(bits=min(stage.bits, widest(stage)), scheme=stage.scheme)
            weight, mask = surgery.weight_2d(target.owner), masks[target.parameter]
            fake.weights[target.parameter] = WeightQuantizer.begin(weight, grid, mask)
        targets = [one for one in (first, former) if one is not None]
        objective = _Aware(work.bundle, stage, targets, lesson.labelled, hidden, lesson.identity)
        objective.scales = fake.parameters()
        with fake_quantized(work, fake):
            settings = stage.model_copy(update={"max_steps": count})
            what = f"training at {stage.bits} bit{'s' * (stage.bits > 1)}"
            result = lesson.run(work.bundle, objective, settings, what, f"stage-{number}", key=number)
            if number + 1 < len(stages):
                with placed(work.bundle.model, find_device(work.context.device)):
                    former = np.concatenate([predict(work.bundle, part) for part in lesson.parts])
        notes.append({"bits": stage.bits, **result.notes()})
    return {**notes[-1], **({"stages": notes[:-1]} if len(notes) > 1 else {})}


class _Aware(Distillation):
    """Distillation with the scales as parameters of its own."""

    scales: Sequence[nn.Parameter] = ()

    def parameter_groups(self) -> list[dict[str, Any]]:
        group = {"params": list(self.scales), "lr": SCALE_RATE * self.settings.learning_rate, "weight_decay": 0.0}
        return [*super().parameter_groups(), *([group] if self.scales else [])]


@contextmanager
def fake_quantized(work: Work, fake: Fake) -> Iterator[None]:
    """While inside, the model computes with rounded weights, table rows and inputs; its parameters stay as they are.

    A weight that several modules share is rounded in all of them.
    """
    changed, hooks = [], []
    try:
        for target in fake.targets:
            weight = target.owner.get_parameter("weight")
            for module in work.bundle.model.modules():
                if getattr(module, "weight", None) is not weight:
                    continue
                if isinstance(module, nn.Embedding):
                    hooks.append(module.register_forward_hook(partial(_looked_up, target)))
                else:
                    module.forward = partial(_forward, module, _weight(fake, target), _input(fake, target))
                    changed.append(module)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in changed:
            del module.forward


Change = Callable[["Tensor"], "Tensor"]


def _weight(fake: Fake, target: Target) -> Change:
    quantizer = fake.weights.get(target.parameter)
    return partial(round_rows, grid=target.grid) if quantizer is None else quantizer.value


def _input(fake: Fake, target: Target) -> Change | None:
    """None: the input stays in float, as `activations.simulate` leaves it."""
    if fake.activations in ("dynamic", "token"):
        return partial(round_input, activations=fake.activations)
    quantizer = fake.inputs.get(target.parameter)
    return None if quantizer is None else quantizer.value


def _forward(module: nn.Module, weight: Change, given: Change | None, x: Tensor) -> Tensor:
    value = weight(surgery.weight_2d(module))
    return linear(x if given is None else given(x), value, getattr(module, "bias", None))


def _looked_up(target: Target, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return round_rows(output, target.grid)
