"""What a step may use beside the model: data, teacher, seed, a folder for resumable state, a place for notes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from flyweight.data import Columns, Examples
from flyweight.settings import Accept
from flyweight.tasks.task import Task

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle

__all__ = ["Context", "NoProgress", "Progress"]

T = TypeVar("T")


class Progress(Protocol):
    """Tells a person how far long work is. The command line draws bars on stderr."""

    def track(self, items: Iterable[T], what: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        """Yield `items` while showing `what`, the share done and the time left."""

    def note(self, text: str) -> None:
        """One line, e.g. the loss so far."""


class NoProgress:
    """Says nothing."""

    def track(self, items: Iterable[T], what: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        yield from items

    def note(self, text: str) -> None:
        pass


@dataclass
class Context:
    """Handed to every step.

    train, validation: labelled examples (None where the user gave none); the held-out `eval` file is not here on purpose
    unlabelled:  further texts for distillation, or None
    calibration: texts to calibrate on, or None
    accept:      the recipe's acceptance rule
    reference:   gives the model after `finetune`, the default teacher
    load:        opens another model folder or artifact for the same task (teacher, student)
    work:        folder for checkpoints; it survives a killed run and is removed when the step is done
    notes:       JSON that goes into the artifact's record of this step (curves, control run, what was removed)
    device:      "cpu", "cuda", ...; by default what accelerate finds
    """

    task: Task
    seed: int
    work: Path
    reference: Callable[[], Bundle]
    load: Callable[[str], Bundle]
    train: Examples | None = None
    validation: Examples | None = None
    unlabelled: Examples | None = None
    calibration: Examples | None = None
    accept: Accept = field(default_factory=Accept)
    progress: Progress = field(default_factory=NoProgress)
    notes: dict[str, Any] = field(default_factory=dict)
    device: str | None = None
    teacher_cache: Path | None = None
    """Folder of cached teacher outputs, named by content hash."""
    tables: Path | None = None
    """Folder of tables of what blocks cost in time, which runs share; None: they last as long as the step's own state."""
    threads: int = 1
    """CPU threads that the result is measured with."""
    columns: Columns = field(default_factory=partial(Columns, label=None))
    """Where further files that a step names have their texts."""
    reread: Callable[[Bundle], dict[str, Any]] | None = None
    """Gives train, validation, unlabelled and calibration in the tokens of another model; None: all have one vocabulary."""

    def seen_by(self, bundle: Bundle) -> Self:
        """The same with all examples, in their order, in the tokens of `bundle`.

        The examples of a step are in those of the model that it is given. Where a vocabulary was pruned, the reference and
        other teachers have another one. Raises DataError for a text that has become too long.
        """
        return self if self.reread is None else replace(self, **self.reread(bundle))
