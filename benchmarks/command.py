"""A command of `flyweight` as a user types it, in a process of its own whose time and memory are watched."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import BaseModel

from benchmarks.runner import Job
from flyweight.artifact import Measurement, StepRecord, is_artifact, read_manifest
from flyweight.measure.memory import tree_memory

# Asking a process of a gigabyte takes 13 ms of its core: at 50 ms that was a quarter of one.
PERIOD_S, SAMPLED = 0.25, "sampled every 250 ms"
BESIDE = ", while other processes used"
PATIENCE_S = 120.0  # to write a checkpoint, once it was told to stop
BUSY = 0.2  # cores in use by others from which on a time says so
QUICK = (
    "--batches",
    "1",
    "--lengths",
    "32",
    "--rounds",
    "3",
    "--leave-out",
    "memory,energy",
)  # measured here, not there


def own_cache(work: Path) -> None:
    """Recipes run in this process go on from what this row left, and from nothing else."""
    os.environ["FLYWEIGHT_CACHE"] = str(work / "cache")


class Other(NamedTuple):
    """A model or file among the flags. shown: what stands for it in the command as it is told"""

    path: Path
    shown: str


class Watched(NamedTuple):
    """others: cores that other processes used meanwhile, on average"""

    seconds: float
    peak_bytes: int
    kind: str
    others: float


class Made(BaseModel):
    """What a command took.

    command:   as it was typed, without folders
    estimated: seconds of the step, as `--dry-run` told before; estimated_bytes: and its peak memory
    resumed:   it went on after a stop, so that its time says nothing
    others:    cores that other processes used meanwhile, on average
    """

    verb: str = "quantize"

    command: str
    seconds: float
    peak_bytes: int
    kind: str
    others: float = 0.0
    resumed: bool
    estimated: float
    estimated_bytes: float = 0.0

    def figures(self, folder: Path) -> dict[str, Measurement]:
        """`quantize.*`, or of another verb; none where the command was stopped and went on."""
        if self.resumed:
            return {}
        what = f"of the whole command in a fresh process: start, load, {self.verb}, export, check"
        beside = f"{BESIDE} {self.others:.1f} cores" if self.others >= BUSY else ""
        step = last_step(folder, self.verb)
        told = "estimated by --dry-run before it ran"
        found = {
            "seconds": Measurement(value=self.seconds, unit="s", n=1, method=f"wall clock {what}{beside}"),
            "step_seconds": Measurement(
                value=step.seconds if step else 0.0, unit="s", n=1, method=f"wall clock of the step alone{beside}"
            ),
            "estimated_seconds": Measurement(value=self.estimated, unit="s", method=f"of the step alone, {told}"),
            "peak_bytes": Measurement(
                value=self.peak_bytes, unit="B", n=1, method=f"peak {self.kind.upper()} {what}, {SAMPLED}"
            ),
        }
        if step and self.estimated_bytes and "peak_memory_bytes" in step.notes:
            how = "peak resident memory of the process while the step ran, all it held before included"
            found["step_peak_bytes"] = Measurement(value=step.notes["peak_memory_bytes"], unit="B", n=1, method=how)
            found["estimated_bytes"] = Measurement(value=self.estimated_bytes, unit="B", method=f"of the step, {told}")
        return {f"{self.verb}.{key}": figure for key, figure in found.items()}


def last_step(folder: Path, verb: str) -> StepRecord | None:
    """The record of the last step of this name in an artifact; what it was made from may have had others."""
    return next((step for step in reversed(read_manifest(folder).steps) if step.name == verb), None)


def made(
    job: Job,
    verb: str,
    model: Path,
    flags: Sequence[str | Other],
    files: dict[str, Path],
    name: str,
    limit_s: float | None = None,
) -> Made:
    """Run the command unless it is done. The artifact is `job.work`/artifact; name: of the model, for the command as shown.

    limit_s: after so long it is stopped as by Ctrl-C; called again, it goes on. Raises SystemExit with the command's own last
    line, or for a stop.
    """
    out, record, cache = job.work / "artifact", job.work / "made.json", job.work / "cache"
    if is_artifact(out) and record.is_file():
        return Made.model_validate_json(record.read_text("utf-8"))
    resumed = cache.exists()
    given = [part for flag, path in files.items() for part in (flag, str(path))]
    shown = [part for flag, path in files.items() for part in (flag, path.name)]
    seed = ["--seed", str(job.seed)]
    real = [str(flag.path) if isinstance(flag, Other) else flag for flag in flags]
    told = [flag.shown if isinstance(flag, Other) else flag for flag in flags]
    program, own = (
        [sys.executable, "-m", "flyweight", verb, str(model), *given, *real, *seed, *QUICK],
        {"FLYWEIGHT_CACHE": str(cache)},
    )
    expected = estimated(program, own, verb)
    watched = watch([*program, "--out", str(out), "--overwrite"], own, job.work / "log", limit_s)
    found = Made(
        verb=verb,
        command=shlex.join(["flyweight", verb, name, *shown, *told, *seed]),
        resumed=resumed,
        estimated=expected.seconds,
        estimated_bytes=expected.bytes,
        **watched._asdict(),
    )
    record.write_text(found.model_dump_json(), encoding="utf-8")
    shutil.rmtree(cache, ignore_errors=True)  # the reference, once more, in every row
    return found


class Expected(NamedTuple):
    """Of a step: seconds, and its peak memory."""

    seconds: float
    bytes: float


def estimated(program: Sequence[str], environment: dict[str, str], step: str) -> Expected:
    """What `--dry-run` expects of the step. Raises SystemExit with the command's last line."""
    command = [*program, "--dry-run", "--json"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit((done.stderr.strip().splitlines() or ["error: expected a plan, got nothing"])[-1])
    rows = [row for row in json.loads(done.stdout)["steps"] if row["step"] == step]
    memory = max((float(row["memory_bytes"]) for row in rows), default=0.0)
    return Expected(sum(float(row["seconds"]) for row in rows), memory)


def watch(command: Sequence[str], environment: dict[str, str], log: Path, limit_s: float | None = None) -> Watched:
    """Run it to its end, and sample the memory of its process tree. Raises SystemExit with its last line, or where it took
    longer than `limit_s` and was stopped."""
    start, peak, kind, used_before = time.perf_counter(), 0, "pss", _used()
    stopped = False
    if limit_s is not None and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # in a shell's background job; the child would inherit it
    with log.open("wb") as said:
        child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=said, stderr=said)
        try:
            process = psutil.Process(child.pid)
            while child.poll() is None:
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    used, found = tree_memory(process)
                    if used > peak:
                        peak, kind = used, found
                if limit_s is not None and time.perf_counter() - start > limit_s:
                    stopped = True
                    child.send_signal(signal.SIGINT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(PATIENCE_S)
                    break
                time.sleep(PERIOD_S)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if stopped and limit_s is not None and child.returncode != 0:
        raise SystemExit(f"error: stopped after {limit_s / 60:.0f} minutes; the same command goes on where it was")
    if child.returncode != 0:
        lines = log.read_text("utf-8", errors="replace").strip().splitlines()
        said_last = next((line for line in reversed(lines) if line.startswith("error:")), (lines or ["nothing"])[-1])
        raise SystemExit(f"error: {said_last.removeprefix('error: ')}")
    seconds = time.perf_counter() - start
    return Watched(seconds, peak, kind, max(0.0, (_used() - used_before) / seconds))


def _used() -> float:
    """Seconds of all cores that processes have used which are neither this one nor its ended children."""
    machine, own = psutil.cpu_times(), os.times()  # of its children: those that have ended
    return machine.user + getattr(machine, "nice", 0.0) + machine.system - sum(own[:4])
