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

__all__ = ["Distillation", "Imitation"]


@dataclass(frozen=True)
class Imitation:
    """The hidden-state half: which student layers imitate which teacher layers, through which maps."""

    teacher: Bundle
    student_layers: Sequence[int]
    teacher_layers: Sequence[int]
    maps: nn.ModuleList


class Distillation:
    """(1-alpha) * CE + alpha * T^2 * KL + hidden_weight * MSE; without labels (1 - cosine) + hidden_weight * MSE.

    targets:  answers by example, one array a teacher; the mean of their losses counts. Empty where they are not asked for
    labelled: which examples have a label, [n] bool. CE is summed over those and divided by the whole batch: an example
              weighs the same whether or not its neighbours have labels
    key:      identity of the teacher; checkpoints under another one do not fit
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
        weight, imitation = self.settings.hidden_weight, self.imitation
        with tap(self.student, imitation.student_layers if imitation else ()) as states:
            given = answer(self.student, batch)
        total = self._answers(given, batch, indices)
        if imitation is None:
            return total
        with tap(imitation.teacher, imitation.teacher_layers) as wanted, torch.no_grad():
            answer(imitation.teacher, batch)
        return total + weight * losses.hidden_states(
            hidden(states, imitation.student_layers),
            hidden(wanted, imitation.teacher_layers),
            list(imitation.maps),
            batch["attention_mask"],
        )

    def _answers(self, given: Tensor, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        alpha = self.settings.alpha if self.task.labelled else 1.0
        total = given.new_zeros(())
        if alpha < 1:
            rows = torch.from_numpy(self.labelled[indices]).to(given.device)
            if bool(rows.any()):
                hard = self.task.loss(given[rows], batch["labels"][rows])
                total = total + (1 - alpha) * hard * (rows.sum() / len(rows))
        for targets in self.targets if alpha > 0 else ():
            wanted = torch.from_numpy(targets[indices]).to(given.device)
            if self.task.labelled:
                soft = alpha * losses.soft_targets(given, wanted, self.settings.temperature)
            else:
                soft = losses.cosine(given, wanted)
            total = total + soft / len(self.targets)
        return total

    def after_step(self, step: int, total: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """The maps are parameters of a group and are in the loop's checkpoint; what remains is whose pupil this is."""
        return {"teacher": self.key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
