"""Times: all candidates in turn within each round, in one process; as a row of their own, or of two beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import numpy as np

from benchmarks.runner import Job, Result, Row, load, reason
from flyweight.artifact import Measurement
from flyweight.engines.engine import Predictor
from flyweight.measure.latency import Point, Samples, Timing, latency_figures, latency_ratio, time_calls

POINTS = (Point(1, 32), Point(1, 128), Point(32, 128))
TIMING = Timing(rounds=60, limit_s=240.0)
Figures = dict[str, Measurement]


def interleaved(
    job: Job, rows: Sequence[Row], against: Mapping[str, str], vocabulary: int, points: Sequence[Point] = POINTS
) -> Result:
    """`ROW:latency_ms...` and `ROW:KEY@POINT` for every row that gave a result; KEY is how many times faster than against[KEY].

    Finished shapes are kept, so that a stopped row goes on. A candidate that cannot be opened is left out, with a note.
    """
    timed = [row for row in rows if row.open is not None and load(job.table, row.name) is not None]
    opened, notes = _open(job, timed)
    return Result(told(taken_in_turn(job, opened, vocabulary, points), against), notes=notes)


def beside(job: Job, result: Predictor, reference: Predictor, vocabulary: int, points: Sequence[Point]) -> Figures:
    """`latency_ms...` and `speedup@POINT` of a result, against the reference in the same rounds. Closes both."""
    taken = taken_in_turn(job, {"result": result, "reference": reference}, vocabulary, points)
    result.close()
    reference.close()
    figures = latency_figures(taken, "result", threads=1)
    for point, samples in taken.items():
        figures[f"speedup@{point}"] = latency_ratio(samples["result"], samples["reference"])
    return figures


def taken_in_turn(
    job: Job, opened: Mapping[str, Predictor], vocabulary: int, points: Sequence[Point]
) -> dict[Point, Samples]:
    """Milliseconds; finished shapes are kept below the row's work."""
    timing = Timing(rounds=3, limit_s=1.0, least=3) if job.trial else TIMING
    taken = {}
    for point in points[:1] if job.trial else points:
        kept = job.work / f"{point}.npz"
        if not _fits(kept, opened):
            samples = time_calls(opened, [point], vocabulary, timing, seed=job.seed)[point]
            with kept.with_suffix(".new").open("wb") as file:
                np.savez(file, **samples)
            kept.with_suffix(".new").replace(kept)
        with np.load(kept) as found:
            taken[point] = {name: found[name] for name in opened}
    return taken


def told(taken: Mapping[Point, Samples], against: Mapping[str, str]) -> Figures:
    """Of every candidate, its name before its figures."""
    names = list(dict.fromkeys(name for samples in taken.values() for name in samples))
    figures: Figures = {}
    for name in names:
        figures |= {f"{name}:{key}": value for key, value in latency_figures(taken, name, threads=1).items()}
        for key, other in against.items():
            if other in names:
                for point, samples in taken.items():
                    figures[f"{name}:{key}@{point}"] = latency_ratio(samples[name], samples[other])
    return figures


def _open(job: Job, rows: Sequence[Row]) -> tuple[dict[str, Predictor], list[str]]:
    opened, notes = {}, []
    for row in rows:
        assert row.open is not None
        try:
            opened[row.name] = row.open(job._replace(row=row.name, work=job.near(row.name)))
        except (Exception, SystemExit) as error:
            notes.append(f"{row.name} could not be timed: {reason(error)}")
    return opened, notes


def _fits(kept: object, opened: Mapping[str, Predictor]) -> bool:
    """Whether a shape was timed with just these candidates."""
    with suppress(OSError, ValueError), np.load(str(kept)) as found:
        return set(found.files) == set(opened)
    return False
