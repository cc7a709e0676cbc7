"""What a block of a model costs in time, on the engine and machine it is meant for: measured once, kept as a table.

Small models (`flyweight.measure.probes`) are exported and opened together, and run in turn, round after round, so that a slow
minute of the machine hits all of them; how slow a round was is then taken out of it.

In a model that is larger than the processor's caches a block finds its weights in memory, and not in the caches where the last
run left them. So between two runs as many bytes pass through the caches as the blocks that a probe leaves out have weights.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flyweight.context import NoProgress, Progress
from flyweight.engines.engine import Arrays, Predictor
from flyweight.errors import StepError, StorageError
from flyweight.measure.costs import Costs, most_units, removable
from flyweight.measure.latency import SHORT_MS, WARM_UP, Timing, random_arrays
from flyweight.measure.probes import Probe, plan, small_model
from flyweight.measure.race import Terms, check_terms, ready
from flyweight.measure.spread import quantile
from flyweight.measure.table import Row, Table, costs_of, file_name, key_of, machine_key, read_table
from flyweight.models import surgery
from flyweight.training.checkpoint import write_atomically

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle

__all__ = ["BLOCKS", "check_given", "costs_in", "latency_costs", "measure_table", "round_robin", "settled", "steady"]

BLOCKS = 2
"""Of each stack in a probe: one block's times are half of differences, so that what a call costs by itself drowns less."""
TIMING = Timing(rounds=40, limit_s=60.0, least=12)
SETTLED = 0.015  # half of a median's 95 % interval, of the median probe: more rounds would tell little more
UNSURE = 0.05
AGAIN_S = 900.0
"""Seconds after which a table that is less sure than that is measured again: the machine may have become quiet."""
MOST_BYTES = 2**27  # that pass between two runs: several times what a core's share of the caches holds


def latency_costs(
    bundle: Bundle,
    terms: Terms,
    folder: Path,
    progress: Progress | None = None,
    blocks: int = BLOCKS,
    timing: Timing = TIMING,
) -> Costs:
    """The costs of the bundle's blocks in milliseconds: from the table in `folder`, or measured and put there.

    Measuring takes some seconds to two minutes. Raises EngineError, ExportError; StepError: texts longer than the model takes.
    """
    progress = progress or NoProgress()
    check_terms(bundle, terms)
    key = key_of(bundle, terms)
    path = folder / file_name({**key, "probes": str(blocks)})
    known = _known(path, key, progress)
    if known is not None and (known.spread <= UNSURE or _age(path) < AGAIN_S):
        progress.note(f"costs of blocks ({terms}) taken from the cache")
        return costs_of(known)
    if known is not None:
        progress.note("the table of costs in the cache was taken on a busy machine: measuring it again")
    table = measure_table(bundle, terms, progress, blocks, timing)
    if known is not None and known.spread < table.spread:
        table = known
    try:
        write_atomically(path, lambda file: file.write(table.model_dump_json(indent=1).encode()))
    except StorageError as error:  # it can be measured again
        progress.note(f"the table of costs is not kept: {error}")
    return costs_of(table)


def _known(path: Path, key: Mapping[str, str], progress: Progress) -> Table | None:
    """The table in the cache; one that is sure is marked as used, one that is not keeps the age of its times."""
    try:
        table = read_table(path, key)
    except FileNotFoundError:
        return None
    except (ValueError, StepError) as error:
        progress.note(f"the table of costs in {path} is damaged ({_line(error)}): measuring it again")
        return None
    if table.spread <= UNSURE:
        with contextlib.suppress(OSError):  # of a cache, what was not used for long goes first
            os.utime(path)
    return table


def _age(path: Path) -> float:
    """Seconds since it was written; no end of them where it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return float("inf")


def costs_in(path: Path, bundle: Bundle, terms: Terms) -> Costs:
    """The costs in a table that somebody gives: its file, or an artifact that was made by it.

    Raises StepError: no such file, damaged, of another machine, engine or shape; EngineError: the engine is not installed.
    """
    check_terms(bundle, terms)
    return costs_of(_given(path, key_of(bundle, terms)))


def check_given(path: Path, terms: Terms) -> None:
    """Of a table that somebody gives, what can be told before the model is there. Raises StepError as `costs_in`."""
    _given(path, machine_key(terms), whole=False)


def _given(path: Path, key: Mapping[str, str], whole: bool = True) -> Table:
    hint = "leave the table out, and one is measured here"
    try:
        return read_table(path, key, whole)
    except FileNotFoundError:
        raise StepError(f"a table of costs at {path}", "no such file", hint) from None
    except ValueError as error:
        raise StepError(f"a whole table of costs at {path}", f"'{_line(error)}'", hint) from None


def measure_table(
    bundle: Bundle,
    terms: Terms,
    progress: Progress | None = None,
    blocks: int = BLOCKS,
    timing: Timing = TIMING,
) -> Table:
    """Raises EngineError, ExportError."""
    progress, began = progress or NoProgress(), time.perf_counter()
    most = most_units(surgery.shapes(bundle.model, bundle.family))
    probes = plan(most, blocks, [kind for kind in most if removable(bundle, kind)])
    with ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        predictors: dict[str, Predictor] = {}
        vocabulary = 0
        for name in progress.track(probes, f"small models for {terms}", total=len(probes)):
            small = small_model(bundle, probes[name], terms.point.length)
            vocabulary = int(small.model.config.vocab_size)
            predictors[name] = ready(small, terms, folder / str(len(predictors)))
            closing.callback(predictors[name].close)
        arrays = random_arrays(terms.point, vocabulary, seed=0)
        between = passing(bytes_left_out(bundle, terms, blocks))
        taken = round_robin(predictors, arrays, timing, between, progress, settled)
    times = steady(taken)
    if spread(times) > UNSURE:
        progress.note(
            f"the machine was busy while blocks were timed: each is unsure by {100 * spread(times):.0f} %, and the "
            "first try may miss the wish"
        )
    return Table(
        key=key_of(bundle, terms),
        rows=tuple(_row(probe, row) for probe, row in zip(probes.values(), times, strict=True)),
        rounds=taken.shape[1],
        seconds=time.perf_counter() - began,
    )


def round_robin(
    predictors: Mapping[str, Predictor],
    arrays: Arrays,
    timing: Timing,
    between: Callable[[], None],
    progress: Progress | None = None,
    enough: Callable[[NDArray[np.float64]], bool] = lambda taken: False,
) -> NDArray[np.float64]:
    """[predictors, rounds] milliseconds. Every round runs each of them, short ones once untimed, then `between`, then timed.

    It ends after `timing.rounds`; from `timing.least` on also at `timing.limit_s` seconds, or when what was taken is `enough`.
    """
    progress = progress or NoProgress()
    for predictor in predictors.values():
        for _ in range(WARM_UP):
            predictor.run(arrays)
    names, start = list(predictors), time.perf_counter()
    last = dict.fromkeys(names, 0.0)
    rounds: list[list[float]] = []
    for number in progress.track(range(timing.rounds), "times of blocks", total=timing.rounds):
        late = time.perf_counter() - start > timing.limit_s
        if number >= timing.least and (late or enough(np.asarray(rounds).T)):
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            if last[name] < SHORT_MS:
                predictors[name].run(arrays)
            between()
            before = time.perf_counter_ns()
            predictors[name].run(arrays)
            last[name] = (time.perf_counter_ns() - before) / 1e6
        rounds.append([last[name] for name in names])
    return np.asarray(rounds).T


def steady(taken: NDArray[np.float64]) -> NDArray[np.float64]:
    """[probes, rounds] -> the same without what a whole round was slower or faster by (a median polish of the logarithms).

    All probes tell how slow a round was, so little noise comes with it.
    """
    logs = np.log(taken)
    slow = np.median(logs - np.median(logs, axis=1, keepdims=True), axis=0)
    return np.asarray(np.exp(logs - slow + np.median(slow)))


def spread(times: NDArray[np.float64]) -> float:
    """Half of the 95 % interval of a median as a share of it, at the median over probes; times [probes, rounds]."""
    found = [quantile(row, 0.5, "ms", "interleaved rounds") for row in times]
    halves = [(one.high - one.low) / 2 / one.value for one in found if one.low is not None and one.high is not None]
    return float(np.median(halves)) if halves else float("inf")


def settled(taken: NDArray[np.float64]) -> bool:
    """Whether further rounds would tell little more."""
    return spread(steady(taken)) <= SETTLED


def bytes_left_out(bundle: Bundle, terms: Terms, blocks: int) -> int:
    """Of the weights of all blocks but `blocks` of each stack."""
    size = 1 if terms.precision == "int8" else 4
    total = 0
    for modules in surgery.blocks(bundle.model, bundle.family).values():
        weights = sum(parameter.numel() for parameter in modules.parameters())
        total += size * weights * max(len(modules) - blocks, 0) // len(modules)
    return total


def passing(size: int) -> Callable[[], None]:
    """Reads so many bytes of memory (up to a limit)."""
    memory = np.ones(min(size, MOST_BYTES) // 8)

    def read() -> None:
        memory.sum()

    return read


def _row(probe: Probe, times: NDArray[np.float64]) -> Row:
    median = quantile(times, 0.5, "ms", "interleaved rounds")
    kept = tuple((kind.stack, kind.attention, units) for kind, units in probe.kept.items())
    return Row(kept=kept, deep=probe.deep, ms=median.value, low=median.low, high=median.high)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
