"""The command line: thin functions over the Python names. Flags come from the settings classes (see `flags`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["app", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 an error, 2 wrong usage, 3 not accepted, 130 interrupted."""
    from flyweight.cli.run import run

    return run(sys.argv[1:] if argv is None else argv)


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'flyweight.cli' has no attribute '{name}'")
    from flyweight.cli.commands import app

    return app
