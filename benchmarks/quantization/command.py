"""`flyweight quantize` as a user types it, in a process of its own whose time and memory are watched."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import BaseModel

from benchmarks.runner import Job
from flyweight.artifact import Measurement, is_artifact, read_manifest
from flyweight.measure.memory import tree_memory

# Asking a process of a gigabyte takes 13 ms of its core: at 50 ms that was a quarter of one.
PERIOD_S, SAMPLED = 0.25, "sampled every 250 ms"
BESIDE = ", while other processes used"
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


def own_cache(job: Job) -> None:
    """Recipes run in this process go on from what this row left, and from nothing else."""
    os.environ["FLYWEIGHT_CACHE"] = str(job.work / "cache")


class Watched(NamedTuple):
    """others: cores that other processes used meanwhile, on average"""

    seconds: float
    peak_bytes: int
    kind: str
    others: float


class Made(BaseModel):
    """What a command took.

    command:   as it was typed, without folders
    estimated: seconds of the step, as `--dry-run` told before
    resumed:   it went on after a stop, so that its time says nothing
    others:    cores that other processes used meanwhile, on average
    """

    command: str
    seconds: float
    peak_bytes: int
    kind: str
    others: float = 0.0
    resumed: bool
    estimated: float

    def figures(self, folder: Path) -> dict[str, Measurement]:
        """`quantize.*`; none where the command was stopped and went on."""
        if self.resumed:
            return {}
        what = "of the whole command in a fresh process: start, load, quantize, export, check"
        beside = f"{BESIDE} {self.others:.1f} cores" if self.others >= BUSY else ""
        steps = sum(step.seconds for step in read_manifest(folder).steps if step.name == "quantize")
        return {
            "quantize.seconds": Measurement(value=self.seconds, unit="s", n=1, method=f"wall clock {what}{beside}"),
            "quantize.step_seconds": Measurement(
                value=steps, unit="s", n=1, method=f"wall clock of the step alone{beside}"
            ),
            "quantize.estimated_seconds": Measurement(
                value=self.estimated, unit="s", method="of the step alone, estimated by --dry-run before it ran"
            ),
            "quantize.peak_bytes": Measurement(
                value=self.peak_bytes, unit="B", n=1, method=f"peak {self.kind.upper()} {what}, {SAMPLED}"
            ),
        }


def made(job: Job, verb: str, model: Path, flags: Sequence[str], files: dict[str, Path], name: str) -> Made:
    """Run the command unless it is done. The artifact is `job.work`/artifact; name: of the model, for the command as shown.

    Raises SystemExit with the command's own last line.
    """
    out, record, cache = job.work / "artifact", job.work / "made.json", job.work / "cache"
    if is_artifact(out) and record.is_file():
        return Made.model_validate_json(record.read_text("utf-8"))
    resumed = cache.exists()
    given = [part for flag, path in files.items() for part in (flag, str(path))]
    shown = [part for flag, path in files.items() for part in (flag, path.name)]
    rest = [*flags, "--seed", str(job.seed)]
    program, own = (
        [sys.executable, "-m", "flyweight", verb, str(model), *given, *rest, *QUICK],
        {"FLYWEIGHT_CACHE": str(cache)},
    )
    expected = estimated(program, own, verb)
    watched = watch([*program, "--out", str(out), "--overwrite"], own, job.work / "log")
    text = shlex.join(["flyweight", verb, name, *shown, *rest])
    found = Made(command=text, resumed=resumed, estimated=expected, **watched._asdict())
    record.write_text(found.model_dump_json(), encoding="utf-8")
    shutil.rmtree(cache, ignore_errors=True)  # the reference, once more, in every row
    return found


def estimated(program: Sequence[str], environment: dict[str, str], step: str) -> float:
    """Seconds that `--dry-run` expects the step to take. Raises SystemExit with the command's last line."""
    command = [*program, "--dry-run", "--json"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit((done.stderr.strip().splitlines() or ["error: expected a plan, got nothing"])[-1])
    return sum(float(row["seconds"]) for row in json.loads(done.stdout)["steps"] if row["step"] == step)


def watch(command: Sequence[str], environment: dict[str, str], log: Path) -> Watched:
    """Run it to its end, and sample the memory of its process tree. Raises SystemExit with its last line."""
    start, peak, kind, used_before = time.perf_counter(), 0, "pss", _used()
    with log.open("wb") as said:
        child = subprocess.Popen(command, env={**os.environ, **environment}, stdout=said, stderr=said)
        try:
            process = psutil.Process(child.pid)
            while child.poll() is None:
                with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                    used, found = tree_memory(process)
                    if used > peak:
                        peak, kind = used, found
                time.sleep(PERIOD_S)
        finally:
            if child.poll() is None:
                child.kill()
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
