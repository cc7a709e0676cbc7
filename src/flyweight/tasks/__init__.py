"""The tasks, one file each. The table holds dotted paths, so that listing them imports nothing."""

from __future__ import annotations

import importlib
from typing import cast

from flyweight.errors import SettingsError, nearest
from flyweight.tasks.task import Task

__all__ = ["TASKS", "Task", "task_named"]

TASKS = {
    "text-classification": "flyweight.tasks.text_classification",
    "embedding": "flyweight.tasks.embedding",
}


def task_named(name: str) -> Task:
    """The task called `name`. Raises SettingsError listing the known ones."""
    if name not in TASKS:
        raise SettingsError("a task", f"'{name}'{nearest(name, TASKS)}", f"known: {', '.join(TASKS)}")
    return cast(Task, importlib.import_module(TASKS[name]).TASK)
