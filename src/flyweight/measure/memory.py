"""Peak memory: of a fresh process that loads a model and answers (what a service needs, not what is left of this process), and
of this process while a step runs.

`python -m flyweight.measure.memory FOLDER ENGINE THREADS BATCH LENGTH VOCABULARY` is the process that is watched.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from flyweight.artifact import Measurement
from flyweight.engines.engine import engine_named
from flyweight.errors import EngineError
from flyweight.measure.latency import Point, random_arrays

__all__ = ["Load", "OwnPeak", "peak_memory", "tree_memory"]

PERIOD_S = 0.01
RUNS = 5
ENOUGH_S = 10.0
Load = tuple[Path, str]
"""A folder and the name of the engine that opens it."""


class OwnPeak:
    """`with OwnPeak() as peak: ...`; then `peak.bytes` is the largest resident memory of this process meanwhile, all that it
    held before included. A thread looks every 10 ms: a shorter peak may be missed."""

    def __init__(self) -> None:
        self.bytes = 0
        self._process, self._done = psutil.Process(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _look(self) -> None:
        self.bytes = max(self.bytes, int(self._process.memory_info().rss))

    def _watch(self) -> None:
        while not self._done.wait(PERIOD_S):
            self._look()

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._look()


def peak_memory(
    load: Load, point: Point, vocabulary: int, threads: int = 1, repeats: int = 3, timeout_s: float = 600.0
) -> Measurement:
    """Largest memory of the process tree over loading and running, sampled about every 10 ms.

    The value is the median over `repeats` fresh processes (fewer once they have taken ENOUGH_S together); low and high
    are the smallest and the largest.
    Raises EngineError when the process fails, with the last line that it wrote.
    """
    folder, engine = load
    arguments = [str(folder), engine, str(threads), *map(str, point), str(vocabulary)]
    start = time.monotonic()
    found = [_watch(arguments, timeout_s)]
    while len(found) < repeats and time.monotonic() - start < ENOUGH_S:
        found.append(_watch(arguments, timeout_s))
    peaks = sorted(found)
    return Measurement(
        value=float(peaks[len(peaks) // 2][0]),
        unit="B",
        low=float(peaks[0][0]) if len(peaks) > 1 else None,
        high=float(peaks[-1][0]) if len(peaks) > 1 else None,
        n=len(peaks),
        method=f"peak {peaks[0][1].upper()} of a fresh process tree that loads with {engine} and runs {point}, "
        "sampled every 10 ms; median, smallest and largest",
    )


def tree_memory(process: psutil.Process) -> tuple[int, str]:
    """(bytes, "pss" | "uss" | "rss") of a process and all below it; PSS counts shared pages by share, so sums are true."""
    total, kind = 0, "pss"
    for one in [process, *process.children(recursive=True)]:
        used, found = _memory(one)
        total += used
        kind = found if used else kind
    return total, kind


def _memory(process: psutil.Process) -> tuple[int, str]:
    try:
        full: Any = process.memory_full_info()
        for kind in ("pss", "uss"):
            if hasattr(full, kind):
                return int(getattr(full, kind)), kind
        return int(full.rss), "rss"
    except psutil.AccessDenied:
        return int(process.memory_info().rss), "rss"
    except psutil.Error:  # it has ended meanwhile
        return 0, "pss"


def _watch(arguments: list[str], timeout_s: float) -> tuple[int, str]:
    command = [sys.executable, "-P", "-m", "flyweight.measure.memory", *arguments]
    peak, kind, end = 0, "pss", time.monotonic() + timeout_s
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=said) as child:
        watched = psutil.Process(child.pid)
        try:
            while child.poll() is None:
                if time.monotonic() > end:
                    raise EngineError(f"a memory run of at most {timeout_s:g} s", "a longer one", "use smaller inputs")
                try:
                    used, found = tree_memory(watched)
                except psutil.Error:
                    break
                if used > peak:
                    peak, kind = used, found
                time.sleep(PERIOD_S)
        finally:
            if child.poll() is None:
                child.kill()
        if child.wait() != 0:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().splitlines()[-1:] or ["nothing"]
            raise EngineError(f"{arguments[1]} to run {arguments[0]} in a fresh process", f"'{last[0]}'")
    return peak, kind


def main(arguments: list[str]) -> None:
    folder, engine, *numbers = arguments
    threads, batch, length, vocabulary = map(int, numbers)
    predictor = engine_named(engine).open(Path(folder), threads)
    arrays = random_arrays(Point(batch, length), vocabulary, seed=0)
    for _ in range(RUNS):
        predictor.run(arrays)
    time.sleep(5 * PERIOD_S)  # let the watcher see the last state
    predictor.close()


if __name__ == "__main__":
    main(sys.argv[1:])
