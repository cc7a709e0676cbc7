"""What goes to stdout: one JSON object, or lines and tables for a person."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_core import to_json

__all__ = ["bytes_text", "print_json", "print_table", "seconds_text"]


def print_json(value: Any) -> None:
    """One object on one line. Models, paths and tuples become JSON; what is no number becomes null."""
    sys.stdout.write(to_json(value, inf_nan_mode="null", fallback=str).decode() + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> None:
    """Columns headed `>name` are aligned to the right. Cells are shown as they are, without markup."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    # Without a terminal there is no width to fit into; a file or a pipe wants whole rows.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def bytes_text(count: float) -> str:
    """1234567 -> `1.2 MB` (decimal)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def seconds_text(seconds: float) -> str:
    """75 -> `1 min 15 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
