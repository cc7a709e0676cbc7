"""The user's files -> training, validation and evaluation examples for one model."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flyweight.data import Columns, Examples, Row, hash_share, rows
from flyweight.errors import DataError
from flyweight.settings import DataSettings
from flyweight.tasks.task import Task
from flyweight.tokenization import Encoder

__all__ = ["Splits", "label_names", "read_calibration", "read_labelled", "read_splits", "read_unlabelled"]

VALIDATION, HELD_OUT = 500, 2000  # spare texts of a calibration file that a task without labels is judged on


@dataclass(frozen=True)
class Splits:
    """train, validation and calibration may be used for tuning; eval is only ever measured on.

    calibration: texts without labels that quantization looks at
    shared:      how many texts of eval stand in train as well; a figure on them says nothing
    """

    train: Examples | None
    validation: Examples | None
    eval: Examples | None
    shared: int = 0
    calibration: Examples | None = None


def columns_of(data: DataSettings, task: Task) -> Columns:
    return Columns(data.text, data.text_pair, data.label if task.labelled else None)


def label_names(data: DataSettings, task: Task) -> tuple[str, ...] | None:
    """The classes of the training file (of the evaluation file where there is none). Raises DataError for one class."""
    path = data.train or data.eval
    if path is None or not task.labelled:
        return None
    return task.label_names({row.label for row in rows(path, columns_of(data, task))})


def read_splits(
    data: DataSettings, task: Task, encoder: Encoder, labels: Sequence[str] | None, samples: int = 0
) -> Splits:
    """Tokenize all files. Without a validation file, a share of train chosen by the hash of the text is held back.

    samples: how many texts to calibrate on, of the file named for it or else of the training examples. Where the task has
             no labels, further texts of that file stand in for a missing validation or evaluation file.

    Raises DataError: see `data.rows`; unknown label; too long a text; a training file too small to split; fewer than
    `samples` texts.
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
    calibration = None
    if samples and data.calibrate is not None:
        calibration, spare_validation, spare_eval = read_calibration(data.calibrate, data, task, encoder, samples)
        if not task.labelled:
            validation = validation or spare_validation
            held_out = held_out or spare_eval
    elif samples and train is not None:
        if len(train) < samples:
            raise _too_few(samples, len(train), data.train)
        some = np.sort(np.random.default_rng(0).choice(len(train), samples, replace=False))
        calibration = replace(train.take(some), labels=None)
    return Splits(train, validation, held_out, shared, calibration)


def read_calibration(
    path: Path, data: DataSettings, task: Task, encoder: Encoder, samples: int
) -> tuple[Examples, Examples | None, Examples | None]:
    """(texts to calibrate on, up to VALIDATION and up to HELD_OUT further ones), chosen by hash, streamed, each text once.

    The same texts are chosen in whatever order the file has them, so that a file sorted by class does no harm.
    """
    most = samples + VALIDATION + HELD_OUT
    lowest: list[tuple[float, int, Row]] = []  # a heap with the largest hash on top
    seen: set[float] = set()
    for number, row in enumerate(rows(path, Columns(data.text, data.text_pair, None))):
        share = hash_share(f"{row.text}\0{row.text_pair or ''}")
        if share in seen or (len(lowest) == most and share >= -lowest[0][0]):
            continue
        seen.add(share)
        if len(lowest) < most:
            heapq.heappush(lowest, (-share, number, row))
        else:
            seen.discard(-heapq.heapreplace(lowest, (-share, number, row))[0])
    chosen = [row for _, _, row in sorted(lowest, key=lambda item: -item[0])]
    if len(chosen) < samples:
        raise _too_few(samples, len(chosen), path)
    rest = chosen[samples:]
    validation = rest[: min(VALIDATION, len(rest) // 3)]
    parts = (chosen[:samples], validation, rest[len(validation) :])
    one, two, three = (task.encode(part, encoder, None) if part else None for part in parts)
    assert one is not None
    return one, two, three


def _too_few(samples: int, found: int, path: Path | None) -> DataError:
    return DataError(
        f"at least {samples} different texts to calibrate on in {path}",
        f"{found}",
        f"give more texts, or lower --samples to at most {found}",
    )


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
