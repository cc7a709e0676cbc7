"""The objective of distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.models.bundle import Bundle
from flyweight.settings import TeacherSettings
from flyweight.tasks import task_named
from flyweight.training import losses
from flyweight.training.objective import answer, parameter_groups
from flyweight.training.teacher import hidden, tap

__all__ = ["Distillation", "Imitation", "swapped"]


@dataclass(frozen=True)
class Imitation:
    """The hidden-state half: which student layers imitate which teacher layers, through which maps."""

    teacher: Bundle
    student_layers: Sequence[int]
    teacher_layers: Sequence[int]
    maps: nn.ModuleList


def swapped(ids: Tensor, ordinary: Tensor, share: float) -> Tensor:
    """ids [batch, length] with so large a share of the ordinary tokens, at random, replaced by ordinary ones of the batch.

    Every text gets a share of its own between 0 and twice the one asked for, so that some stay nearly as they are.
    """
    place = ordinary.nonzero(as_tuple=True)
    rates = (2 * share * torch.rand(len(ids), 1)).expand(ids.shape).to(ids.device)
    chosen = torch.rand(len(place[0])).to(ids.device) < rates[place]
    there = ids[place]
    others = there[torch.randint(max(len(there), 1), (len(there),)).to(ids.device)]
    found = ids.clone()
    found[place] = torch.where(chosen, others, there)
    return found


class Distillation:
    """(1-alpha) * CE + alpha * T^2 * KL + hidden_weight * MSE; without labels (1 - cosine) + hidden_weight * MSE.

    targets:  answers by example, one array a teacher; the mean of their losses counts. Empty where they are not asked for
    labelled: which examples have a label, [n] bool. CE is summed over those and divided by the whole batch: an example
              weighs the same whether or not its neighbours have labels
    key:      identity of the teacher; checkpoints under another one do not fit

    With `augment` the teacher of the hidden states answers every changed text anew, in place of all `targets`.
    """

    def __init__(
        self,
        student: Bundle,
        settings: TeacherSettings,
        targets: Sequence[NDArray[np.float32]],
        labelled: NDArray[np.bool_],
        imitation: Imitation | None,
        key: str,
    ) -> None:
        self.student, self.settings, self.task = student, settings, task_named(student.task)
        self.targets, self.labelled, self.imitation, self.key = targets, labelled, imitation, key

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = parameter_groups(self.student.model, self.settings)
        return groups if self.imitation is None else groups + parameter_groups(self.imitation.maps, self.settings)

    def loss(self, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        weight, imitation, share = self.settings.hidden_weight, self.imitation, self.settings.augment
        if share > 0:
            batch = {**batch, "input_ids": swapped(batch["input_ids"], self._ordinary(batch), share)}
        with tap(self.student, imitation.student_layers if imitation else ()) as states:
            given = answer(self.student, batch)
        targets = [torch.from_numpy(targets[indices]).to(given.device) for targets in self.targets]
        if imitation is None:
            return self._answers(given, batch, indices, targets)
        with tap(imitation.teacher, imitation.teacher_layers) as wanted, torch.no_grad():
            told = answer(imitation.teacher, batch)
        total = self._answers(given, batch, indices, [told] if share > 0 and targets else targets)
        return total + weight * losses.hidden_states(
            hidden(states, imitation.student_layers),
            hidden(wanted, imitation.teacher_layers),
            list(imitation.maps),
            batch["attention_mask"],
        )

    def _ordinary(self, batch: dict[str, Tensor]) -> Tensor:
        """[batch, length] bool: real tokens that are no special ones."""
        special = torch.tensor(self.student.encoder.special, device=batch["input_ids"].device)
        return batch["attention_mask"].bool() & ~torch.isin(batch["input_ids"], special)

    def _answers(
        self, given: Tensor, batch: dict[str, Tensor], indices: NDArray[np.int64], targets: Sequence[Tensor]
    ) -> Tensor:
        alpha = self.settings.alpha if self.task.labelled else 1.0
        total = given.new_zeros(())
        if alpha < 1:
            rows = torch.from_numpy(self.labelled[indices]).to(given.device)
            if bool(rows.any()):
                hard = self.task.loss(given[rows], batch["labels"][rows])
                total = total + (1 - alpha) * hard * (rows.sum() / len(rows))
        for wanted in targets if alpha > 0 else ():
            if self.task.labelled:
                soft = alpha * losses.soft_targets(given, wanted, self.settings.temperature)
            else:
                soft = losses.cosine(given, wanted)
            total = total + soft / len(targets)
        return total

    def after_step(self, step: int, total: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """The maps are parameters of a group and are in the loop's checkpoint; what remains is whose pupil this is."""
        return {"teacher": self.key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
