"""One runner for all tables: a row is a job in a process of its own, of at most 30 minutes, that goes on where it was.

benchmarks/results/<table>/<row>.json    what a row gave, with its command, machine, versions and seed; kept in git
benchmarks/results/<table>.md            the rows as a table
benchmarks/.work/<table>/<row>/          what a row needs to go on after it was stopped; not kept
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import reviews
from flyweight.artifact import Measurement
from flyweight.engines.engine import Predictor
from flyweight.measure.environment import environment

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WORK = HERE / ".work"
LIMIT_MINUTES = 30.0
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
)


class Job(NamedTuple):
    """What a row may use. `work` survives a stopped run; `near(row)` is the folder of another row of the same table."""

    table: str
    row: str
    seed: int
    work: Path

    def near(self, row: str) -> Path:
        return self.work.parent / row

    @property
    def data(self) -> reviews.Reviews:
        folder = WORK / "rotten_tomatoes"
        files = reviews.Reviews(folder / "train.jsonl", folder / "eval.jsonl")
        return files if all(path.is_file() for path in files) else reviews.write(folder)


class Result(NamedTuple):
    """figures: {key: measurement}; scores: one number an example, whose mean is the main metric: what pairs are made of."""

    figures: Mapping[str, Measurement]
    scores: Sequence[float] | None = None


class Row(NamedTuple):
    """summary: as the table shows it; minutes: what it costs on 2 cores; open: a predictor to be timed, once `run` is done."""

    name: str
    summary: str
    minutes: float
    run: Callable[[Job], Result]
    open: Callable[[Job], Predictor] | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """reference: the row that differences and speed-ups are told against."""

    name: str
    title: str
    about: str
    rows: tuple[Row, ...]
    reference: str

    def row(self, name: str) -> Row:
        found = [row for row in self.rows if row.name == name]
        if not found:
            raise SystemExit(
                f"error: expected a row of {self.name}, got '{name}'; known: {', '.join(r.name for r in self.rows)}"
            )
        return found[0]


def result_path(table: str, row: str) -> Path:
    return RESULTS / table / f"{row}.json"


def load(table: str, row: str) -> dict[str, Any] | None:
    """What the row gave, or None where it has not run yet."""
    path = result_path(table, row)
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def run_table(table: Table, only: Sequence[str], again: bool, seed: int) -> int:
    """Run the rows that have no result yet, each in its own process. Returns the number that failed."""
    wanted = [row for row in table.rows if not only or row.name in only]
    for name in only:
        table.row(name)
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
            failed += 1
            continue
        if again:
            shutil.rmtree(WORK / table.name / row.name, ignore_errors=True)
        failed += not _run_in_process(table.name, row.name, seed)
    return failed


def _run_in_process(table: str, row: str, seed: int) -> bool:
    print(f"{row}: started", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks", "row", table, row, "--seed", str(seed)]
    try:
        done = subprocess.run(command, timeout=LIMIT_MINUTES * 60, cwd=HERE.parent, env={**os.environ, **QUIET})
    except subprocess.TimeoutExpired:
        print(f"{row}: stopped after {LIMIT_MINUTES:g} minutes; the same command goes on where it was")
        return False
    minutes = (time.perf_counter() - start) / 60
    print(f"{row}: {'done' if done.returncode == 0 else 'failed'} after {minutes:.1f} minutes", flush=True)
    return done.returncode == 0


def run_row(table: Table, name: str, seed: int) -> None:
    """Run one row here and keep what it gave."""
    row = table.row(name)
    job = Job(table.name, name, seed, WORK / table.name / name)
    job.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    result = row.run(job)
    record = {
        "table": table.name,
        "row": name,
        "summary": row.summary,
        "command": f"python -m benchmarks run {table.name} --rows {name} --seed {seed}",
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(time.perf_counter() - start, 1),
        "seed": seed,
        "machine": machine(),
        "versions": versions(),
        "figures": {key: value.model_dump(exclude_none=True) for key, value in result.figures.items()},
        "scores": None if result.scores is None else pack_scores(result.scores),
    }
    path = result_path(table.name, name)
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


def pack_scores(scores: Sequence[float]) -> str | list[float]:
    """Right and wrong answers as a string of 1 and 0; other scores as they are."""
    if all(score in (0, 1) for score in scores):
        return "".join(str(int(score)) for score in scores)
    return [round(float(score), 6) for score in scores]


def unpack_scores(packed: str | list[float]) -> list[float]:
    return [float(score) for score in packed]
