"""The one tree of errors.

    FlyweightError                 everything Flyweight raises on purpose; the command line prints it in one line, exit 1
    ├── SettingsError              a flag, a recipe key or a value is wrong
    ├── DataError                  a file of examples cannot be used
    ├── ModelError                 a model folder cannot be read, or its family is unknown
    ├── ArtifactError              an artifact is damaged, incomplete or in the way
    ├── StepError                  a step cannot run here: illegal order, nothing left to remove, ...
    ├── TrainingError              the loss is no longer a number, or a checkpoint does not fit
    ├── ExportError                an engine's file differs from torch, or cannot be made
    ├── EngineError                an engine is missing or refuses the file
    ├── MissingExtra               a part of Flyweight that is not installed
    └── StorageError               the disk is full or cannot be written
    Interrupted                    Ctrl-C; the work can be resumed (not a FlyweightError: exit 130)

A message has three parts: what was expected, what came, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtifactError",
    "DataError",
    "EngineError",
    "ExportError",
    "FlyweightError",
    "Interrupted",
    "MissingExtra",
    "ModelError",
    "SettingsError",
    "StepError",
    "StorageError",
    "TrainingError",
    "nearest",
]


class FlyweightError(Exception):
    """One line for a person: `expected {expected}, got {got}; {hint}`.

    `got` and `hint` may be left out where they would say nothing new.
    """

    def __init__(self, expected: str, got: str | None = None, hint: str | None = None) -> None:
        self.expected, self.got, self.hint = expected, got, hint
        message = expected if got is None else f"expected {expected}, got {got}"
        if hint:
            message += f"; {hint}"
        super().__init__(" ".join(message.split()))


class SettingsError(FlyweightError): ...


class DataError(FlyweightError): ...


class ModelError(FlyweightError): ...


class ArtifactError(FlyweightError): ...


class StepError(FlyweightError): ...


class TrainingError(FlyweightError): ...


class ExportError(FlyweightError): ...


class EngineError(FlyweightError): ...


class MissingExtra(FlyweightError): ...


class StorageError(FlyweightError): ...


class Interrupted(KeyboardInterrupt):
    """Raised on Ctrl-C once the state is safe on disk; `str()` says how to go on."""


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, else an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{found[0]}'?)" if found else ""
