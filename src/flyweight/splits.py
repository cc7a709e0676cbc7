"""The user's files -> training, validation and evaluation examples for one model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flyweight.data import Columns, Examples, Row, hash_share, rows
from flyweight.errors import DataError
from flyweight.settings import DataSettings
from flyweight.tasks.task import Task
from flyweight.tokenization import Encoder

__all__ = ["Splits", "label_names", "read_labelled", "read_splits", "read_unlabelled"]


@dataclass(frozen=True)
class Splits:
    """train and validation may be used for tuning; eval is only ever measured on.

    shared: how many texts of eval stand in train as well; a figure on them says nothing
    """

    train: Examples | None
    validation: Examples | None
    eval: Examples | None
    shared: int = 0


def columns_of(data: DataSettings, task: Task) -> Columns:
    return Columns(data.text, data.text_pair, data.label if task.labelled else None)


def label_names(data: DataSettings, task: Task) -> tuple[str, ...] | None:
    """The classes of the training file (of the evaluation file where there is none). Raises DataError for one class."""
    path = data.train or data.eval
    if path is None or not task.labelled:
        return None
    return task.label_names({row.label for row in rows(path, columns_of(data, task))})


def read_splits(data: DataSettings, task: Task, encoder: Encoder, labels: Sequence[str] | None) -> Splits:
    """Tokenize all files. Without a validation file, a share of train chosen by the hash of the text is held back.

    Raises DataError: see `data.rows`; unknown label; too long a text; a training file too small to split.
    """
    seen: set[bytes] = set()

    def read(path: Path, keep: Callable[[Row], bool]) -> Examples:
        return task.encode((row for row in rows(path, columns_of(data, task)) if keep(row)), encoder, labels)

    def remember(row: Row) -> bool:
        seen.add(_digest(row))
        return True

    train = validation = None
    if data.validation is not None:
        validation = read(data.validation, lambda row: True)
    if data.train is not None and data.validation is None:
        share = data.validation_share
        train = read(data.train, lambda row: remember(row) and hash_share(row.text) >= share)
        validation = read(data.train, lambda row: hash_share(row.text) < share)
    elif data.train is not None:
        train = read(data.train, remember)
    for name, part in (("training", train), ("validation", validation)):
        if part is not None and len(part) == 0:
            raise DataError(
                f"enough rows in {data.train} for training and validation",
                f"no {name} example",
                "give more rows or --validation",
            )
    shared = 0

    def count(row: Row) -> bool:
        nonlocal shared
        shared += _digest(row) in seen
        return True

    held_out = read(data.eval, count) if data.eval is not None else None
    return Splits(train, validation, held_out, shared)


def read_labelled(
    path: Path, data: DataSettings, task: Task, encoder: Encoder, labels: Sequence[str] | None
) -> Examples:
    """One file of labelled examples, as `evaluate` and `compare` take it."""
    return task.encode(rows(path, columns_of(data, task)), encoder, labels)


def read_unlabelled(path: Path, data: DataSettings, task: Task, encoder: Encoder) -> Examples:
    """Texts only; a label column is ignored where there is one."""
    return task.encode(rows(path, Columns(data.text, data.text_pair, None)), encoder, None)


def _digest(row: Row) -> bytes:
    return hashlib.blake2b(f"{row.text}\0{row.text_pair or ''}".encode(), digest_size=12).digest()
