"""Ctrl-C between two updates, never within one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

__all__ = ["Interrupt"]


class Interrupt:
    """While entered, a first SIGINT inside `held()` waits for its end; elsewhere it is a KeyboardInterrupt at once.

    torn: an exception, or a second SIGINT, left `held()` half-way: model and optimizer no longer fit together.
    """

    def __init__(self) -> None:
        self.torn, self._pending, self._deaf = False, False, False
        self._former: Any = None

    def __enter__(self) -> Self:
        # only the main thread may set handlers; who ignores SIGINT (nohup) wants it ignored here too
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) not in (
            signal.SIG_IGN,
            None,
        ):
            self._former = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deaf:
            return
        if self.torn and not self._pending:
            self._pending = True
            return
        raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Around what must be done whole."""
        self.torn = True
        yield
        self.torn = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """From here on: the last checkpoint is being written."""
        self._deaf = True
