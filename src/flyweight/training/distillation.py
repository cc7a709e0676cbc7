"""The objective of distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flyweight.models.bundle import Bundle
from flyweight.settings import DistillSettings, TeacherSettings
from flyweight.tasks import task_named
from flyweight.training import losses
from flyweight.training.augment import Changes
from flyweight.training.imitation import Imitation
from flyweight.training.objective import answer, parameter_groups
from flyweight.training.teacher import Top
from flyweight.training.watch import Seen

__all__ = ["Distillation", "Imitation", "Live", "Terms"]


class Terms(NamedTuple):
    """Which losses compare answers; `kl` may be `none`."""

    kl: str = "forward"
    dist: float = 0.0
    mse: float = 0.0

    @classmethod
    def of(cls, settings: TeacherSettings) -> Terms:
        if not isinstance(settings, DistillSettings):
            return cls()
        return cls(settings.kl, settings.dist_weight, settings.mse_weight)

    def __bool__(self) -> bool:
        return self.kl != "none" or self.dist > 0 or self.mse > 0


@dataclass(frozen=True)
class Live:
    """Teachers that are asked in every step, about changed texts; the one that is imitated first."""

    teachers: Sequence[Bundle]
    changes: Changes


class Distillation:
    """(1-alpha) * CE + alpha * answers + what `Imitation` adds; without labels (1 - cosine) + what `Imitation` adds.

    answers: T^2 * KL + dist_weight * DIST + mse_weight * MSE of logits

    targets:  answers by example, one array or Top a teacher. Empty where they are not asked for
    labelled: which examples have a label, [n] bool. CE is summed over those and divided by the whole batch: an example
              weighs the same whether or not its neighbours have labels
    key:      identity of the teachers; checkpoints under another one do not fit
    shares:   weight of every teacher's answers, together 1; by default all alike
    live:     in place of `targets`. The teacher's half of the loss then sees changed texts, the label's half those of the data
    """

    def __init__(
        self,
        student: Bundle,
        settings: TeacherSettings,
        targets: Sequence[NDArray[np.float32] | Top],
        labelled: NDArray[np.bool_],
        imitation: Imitation | None,
        key: str,
        *,
        shares: Sequence[float] | None = None,
        live: Live | None = None,
    ) -> None:
        self.student, self.settings, self.task = student, settings, task_named(student.task)
        self.targets, self.labelled, self.imitation, self.key = targets, labelled, imitation, key
        self.terms, self.live, self.done = Terms.of(settings), live, 0
        count = len(live.teachers) if live is not None else len(targets)
        self.shares = [1 / max(count, 1)] * count if shares is None else list(shares)
        self.per_epoch = max(math.ceil(len(labelled) / settings.batch_size), 1)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = parameter_groups(self.student.model, self.settings)
        return groups if self.imitation is None else groups + parameter_groups(self.imitation.learned, self.settings)

    def loss(self, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        if self.live is not None:
            return self._changed(self.live, batch, indices)
        given, mine = self._watched(batch)
        total = self._hard(given, batch, indices)
        if self._answers_count:
            wanted = [self._row(targets, indices, given.device) for targets in self.targets]
            total = total + self._soft(given, wanted)
        if self.imitation is None:
            return total
        with self.imitation.watch_teacher() as theirs, torch.no_grad():
            answer(self.imitation.teacher, batch)
        return total + self.imitation.loss(mine, theirs, batch["attention_mask"])

    @property
    def _alpha(self) -> float:
        return self.settings.alpha if self.task.labelled else 1.0

    @property
    def _answers_count(self) -> bool:
        return self._alpha > 0 and (not self.task.labelled or bool(self.terms))

    def _watched(self, batch: dict[str, Tensor]) -> tuple[Tensor, Seen]:
        """The student's answer, and what passed inside of it."""
        with nullcontext(Seen()) if self.imitation is None else self.imitation.watch_student(self.student) as mine:
            return answer(self.student, batch), mine

    def _changed(self, live: Live, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        """The loss where the teachers are asked about changed texts; labels belong to the texts as they are."""
        changed = live.changes.apply(batch, indices, self.done // self.per_epoch)
        given, mine = self._watched(changed)
        wanted, theirs = self._ask(live, changed)
        total = self._soft(given, wanted) if self._answers_count else given.new_zeros(())
        if self._alpha < 1:
            rows = torch.from_numpy(self.labelled[indices]).to(given.device)
            if bool(rows.any()):
                plain = answer(self.student, {name: value[rows] for name, value in batch.items()})
                total = total + self._of_labels(plain, batch["labels"][rows], len(rows))
        if self.imitation is not None:
            total = total + self.imitation.loss(mine, theirs, changed["attention_mask"])
        return total

    def _ask(self, live: Live, batch: dict[str, Tensor]) -> tuple[list[Tensor], Seen]:
        """The answers of all teachers, and what passed inside of the first."""
        first, *others = live.teachers
        with torch.no_grad():
            with nullcontext(Seen()) if self.imitation is None else self.imitation.watch_teacher() as theirs:
                wanted = [answer(first, batch)]
            wanted += [answer(one, batch) for one in others if self._answers_count]
        return wanted, theirs

    def _hard(self, given: Tensor, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        if self._alpha < 1:
            rows = torch.from_numpy(self.labelled[indices]).to(given.device)
            if bool(rows.any()):
                return self._of_labels(given[rows], batch["labels"][rows], len(rows))
        return given.new_zeros(())

    def _of_labels(self, given: Tensor, labels: Tensor, whole: int) -> Tensor:
        return (1 - self._alpha) * self.task.loss(given, labels) * (len(labels) / whole)

    def _soft(self, given: Tensor, wanted: Sequence[Tensor | Top]) -> Tensor:
        total = given.new_zeros(())
        for one, share in zip(wanted, self.shares, strict=True):
            if self.task.labelled:
                total = total + share * self._alpha * self._compared(given, one)
            else:
                total = total + share * losses.cosine(given, cast(Tensor, one))
        return total

    def _compared(self, given: Tensor, wanted: Tensor | Top) -> Tensor:
        terms, temperature = self.terms, self.settings.temperature
        total = given.new_zeros(())
        if terms.kl != "none":
            kind = cast(losses.Kind, terms.kl)
            if isinstance(wanted, Top):
                total = total + losses.top_targets(given, *wanted.tensors(given.device), temperature, kind)
            else:
                total = total + losses.soft_targets(given, wanted, temperature, kind)
        if terms.dist:
            total = total + terms.dist * losses.dist(given, cast(Tensor, wanted), temperature)
        if terms.mse:
            total = total + terms.mse * losses.logits(given, cast(Tensor, wanted))
        return total

    @staticmethod
    def _row(targets: NDArray[np.float32] | Top, indices: NDArray[np.int64], device: torch.device) -> Tensor | Top:
        return targets.take(indices) if isinstance(targets, Top) else torch.from_numpy(targets[indices]).to(device)

    def after_step(self, step: int, total: int) -> None:
        self.done = step

    def state_dict(self) -> dict[str, Any]:
        """The maps are parameters of a group and are in the loop's checkpoint; what remains is whose pupil this is, and how
        far it has come, which the changes of texts depend on."""
        return {"teacher": self.key, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = int(state["done"])
