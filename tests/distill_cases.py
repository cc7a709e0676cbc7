"""A teacher folder, a context and settings for the tests of distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import training_cases as cases
from flyweight.context import Context
from flyweight.models.bundle import Bundle
from flyweight.settings import DistillSettings
from flyweight.tasks import task_named

SETTINGS = DistillSettings(epochs=2, batch_size=8, learning_rate=1e-3, layers="every-other")


class School:
    """A teacher folder, a context, and how often the teacher was asked."""

    def __init__(self, folder: Path, work: Path, task: str = "text-classification", **changes: Any) -> None:
        self.folder, self.task, self.calls, self.loads = folder, task, 0, []
        usual: dict[str, Any] = {"train": cases.examples(64), "validation": cases.examples(24, seed=1)}
        self.context = Context(
            task_named(task),
            seed=0,
            work=work / "work",
            teacher_cache=work / "cache",
            reference=self.reference,
            load=self.load,
            device="cpu",
            **{**usual, **changes},
        )

    def bundle(self) -> Bundle:
        return cases.open_bundle(self.folder, self.task)

    def reference(self) -> Bundle:
        teacher = self.bundle()
        teacher.model.register_forward_hook(self._count)
        return teacher

    def load(self, path: str) -> Bundle:
        self.loads.append(path)
        return cases.open_bundle(Path(path), self.task)

    def _count(self, *_: Any) -> None:
        self.calls += 1


def small_school(folder: Path, work: Path) -> School:
    """`student: small` is half as wide as the teacher and has its tokenizer."""
    school = School(folder, work)

    def load(path: str) -> Bundle:
        import tiny

        made = work / path
        if not made.exists():
            tiny.write(made, "bert", ("negative", "positive"), 1, hidden_size=16, num_hidden_layers=2)
        return cases.open_bundle(made)

    school.context.load = load
    return school
