"""Whether an engine is faster for zeros that nobody took out: the same model dense, with 50 % and 90 % zeros, and 2:4."""

from __future__ import annotations

from benchmarks.latency import POINTS, taken_in_turn, told
from benchmarks.models import MINILM
from benchmarks.runner import Job, Result, Row
from benchmarks.structure.asks import row_name
from benchmarks.structure.rows import artifact_of, opened, reference, words

SEED = 0
ENGINES = ("onnxruntime", "openvino")
DENSE = "dense"
KINDS = {
    "50 %": row_name(MINILM, "zeros-magnitude-50", SEED),
    "90 %": row_name(MINILM, "zeros-magnitude-90", SEED),
    "2:4": row_name(MINILM, "zeros-magnitude-2of4", SEED),
}
NAME = "zeros-latency"


def candidate(kind: str, engine: str) -> str:
    return f"{kind} in {engine}"


def faster(engine: str) -> str:
    """The key of how many times faster than dense in the same engine."""
    return f"vs_dense_{engine}"


def run_latency(job: Job) -> Result:
    folders = {DENSE: reference(MINILM, SEED), **{kind: artifact_of(job, row) for kind, row in KINDS.items()}}
    every = {candidate(kind, engine): opened(where, engine) for engine in ENGINES for kind, where in folders.items()}
    against = {faster(engine): candidate(DENSE, engine) for engine in ENGINES}
    figures = told(taken_in_turn(job, every, words(*folders.values()), POINTS), against)
    for predictor in every.values():
        predictor.close()
    return Result(figures)


NEEDS = (row_name(MINILM, "fp32", SEED), *KINDS.values())
ROW = Row(NAME, "times of dense and sparse weights, interleaved", 8, run_latency, None, NEEDS)
