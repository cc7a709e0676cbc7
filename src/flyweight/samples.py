"""Rows of the user's data in the report, only where `--include-samples` asks for them: where the answers changed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import NamedTuple

from flyweight.data import rows
from flyweight.runtime import open_model
from flyweight.settings import DataSettings
from flyweight.splits import columns_of
from flyweight.tasks import Task

__all__ = ["Sample", "changed_answers"]

LOOKED_AT = 2000


class Sample(NamedTuple):
    """One held-out text whose answer is another one than the reference's."""

    text: str
    label: str
    reference: str
    result: str


def changed_answers(
    data: DataSettings, task: Task, reference: Path, result: Path, most: int = 20
) -> tuple[Sample, ...] | None:
    """Up to `most` of the first 2,000 held-out rows where the two artifacts disagree; None for a task without classes."""
    if data.eval is None or not task.labelled:
        return None
    some = list(islice(rows(data.eval, columns_of(data, task)), LOOKED_AT))
    texts = [row.text if row.text_pair is None else (row.text, row.text_pair) for row in some]
    answers = []
    for folder in (reference, result):
        with open_model(folder, truncate=data.truncate) as model:
            answers.append([answer[0] for answer in model.predict(texts)])
    found = [
        Sample(row.text, str(row.label), *(f"{one['label']} ({one['score']:.2f})" for one in (before, after)))
        for row, before, after in zip(some, *answers, strict=True)
        if before["label"] != after["label"]
    ]
    return tuple(found[:most])
