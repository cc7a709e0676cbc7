"""How far long work is, on stderr: bars in a terminal, else a line now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from flyweight.cli.output import seconds_text

if TYPE_CHECKING:
    from flyweight.context import Progress

__all__ = ["Bars", "Lines", "working"]

T = TypeVar("T")
EVERY = 10.0  # seconds between two lines of one task


def total_of(items: Iterable[Any], total: int | None, done: int) -> int | None:
    """All there is to do, what was done before included."""
    if total is not None:
        return total
    return len(items) + done if isinstance(items, Sized) else None


class Lines:
    """For logs and pipes: at most one line every `EVERY` seconds a task, none for short ones.

    Notes made while a task runs (the loss so far) are thinned out alike; the last one is always told.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream, clock
        self.running = 0
        self.noted = -EVERY
        self.held: str | None = None

    def note(self, text: str) -> None:
        now = self.clock()
        if self.running and now - self.noted < EVERY:
            self.held = text
            return
        self.held = None
        if self.running:
            self.noted = now
        self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def track(self, items: Iterable[T], what: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        total = total_of(items, total, done)
        began = last = self.clock()
        at = done
        self.running += 1
        try:
            for item in items:
                yield item
                at += 1
                now = self.clock()
                if now - last >= EVERY:
                    last = now
                    self._print(f"{what}: {self._state(at, total, (now - began) / (at - done))}")
        finally:
            self.running -= 1
            if self.held is not None:
                self._print(self.held)
                self.held = None
        if last > began:
            self._print(f"{what}: done in {seconds_text(self.clock() - began)}")

    def _state(self, at: int, total: int | None, seconds_each: float) -> str:
        if not total:
            return f"{at} done"
        left = seconds_text(max(total - at, 0) * seconds_each)
        return f"{100 * at / total:.0f} % ({at} of {total}), {left} left"


class Bars:
    """For a terminal: one bar a running task, gone when it is done; notes stay above."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        # Everything long goes to stderr: stdout is for results.
        self.bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def note(self, text: str) -> None:
        self.bars.console.print(text, markup=False, highlight=False)

    def track(self, items: Iterable[T], what: str, total: int | None = None, done: int = 0) -> Iterator[T]:
        self.bars.start()
        task = self.bars.add_task(what, total=total_of(items, total, done), completed=done)
        try:
            for item in items:
                yield item
                self.bars.advance(task)
        finally:
            self.bars.remove_task(task)
            if not self.bars.tasks:
                self.bars.stop()

    def close(self) -> None:
        self.bars.stop()


@contextlib.contextmanager
def working() -> Iterator[Progress]:
    """Around long work: gives a Progress, and sends to stderr whatever a library prints on stdout meanwhile."""
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        if sys.stderr.isatty():
            bars = Bars()
            stack.callback(bars.close)
            yield bars
        else:
            yield Lines(sys.stderr)
