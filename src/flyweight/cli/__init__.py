"""The command line: thin functions over the Python names. Flags come from the settings classes (see `flags`)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

__all__ = ["app", "main", "program"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 an error, 2 wrong usage, 3 not accepted, 130 interrupted."""
    from flyweight.cli.run import run

    return run(sys.argv[1:] if argv is None else argv)


def program() -> None:
    """`main` as a program of its own, which ends with its status."""
    status = main()
    if "granian" in sys.modules:
        # The server's threads are not Python's: one that asks for the interpreter while that is taken down aborts it (SIGABRT).
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'flyweight.cli' has no attribute '{name}'")
    from flyweight.cli.commands import app

    return app
