"""All figures of several models in one run: each kind is taken of all of them in turn, never of one model after another."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flyweight.artifact import Measurement
from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.engines.engine import Predictor
from flyweight.measure.energy import Meter
from flyweight.measure.latency import Point, Samples, Timing, latency_figures, latency_ratio, random_arrays, time_calls
from flyweight.measure.memory import peak_memory
from flyweight.measure.quality import answers, difference, quality, resamples
from flyweight.measure.size import disk
from flyweight.measure.spread import quantile
from flyweight.settings import MeasureSettings
from flyweight.tasks.task import Task

__all__ = ["Candidate", "Figures", "Labelled", "measure"]

Figures = dict[str, Measurement]
ENERGY_TURNS = 6  # the fewest that give the median a 95 % interval
ENERGY_TURN_S = 0.5  # CPU time comes in steps of 10 ms


@dataclass(frozen=True)
class Labelled:
    """Held-out examples, tokenized for one model; row i is the same text for every model of a run."""

    task: Task
    examples: Examples
    pad: int


@dataclass(frozen=True)
class Candidate:
    """One model in a run.

    open:       gives its predictor, with the threads of the settings; called once
    folder:     artifact or model folder; its bytes are counted, and a fresh process loads it for the memory figure
    engine:     what that process loads it with
    vocabulary: token ids lie below this
    labelled:   what quality is taken on, or None
    quality_batch: texts that share a batch where quality is taken; 1 where answers depend on the neighbours in a batch
    figures:    figures known already: those that need torch (parameters, flops, bytes by part), or a manifest's
    """

    open: Callable[[], Predictor]
    folder: Path
    engine: str
    vocabulary: int
    labelled: Labelled | None = None
    quality_batch: int = 32
    figures: Figures = field(default_factory=dict)


def measure(
    candidates: Mapping[str, Candidate],
    settings: MeasureSettings,
    *,
    references: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
    card: bool = False,
) -> dict[str, Figures]:
    """{candidate: {key: Measurement}} with the keys of the manifest.

    references: candidates that `speedup.NAME@1x128` of the others is told against (paired by round); the first of them
                is also what `quality.METRIC.difference` is told against
    card:       the work runs on NVIDIA cards: their energy counts
    Raises EngineError, ArtifactError.
    """
    progress = progress or NoProgress()
    found: dict[str, Figures] = {name: dict(one.figures) for name, one in candidates.items()}
    for name, one in candidates.items():
        found[name] |= disk(one.folder, one.engine)
    points = [Point(batch, length) for batch in sorted(settings.batches) for length in sorted(settings.lengths)]
    single, heavy = Point(1, max(settings.lengths)), points[-1]
    for name in progress.track(() if "memory" in settings.leave_out else candidates, "memory", total=len(candidates)):
        one = candidates[name]
        found[name]["peak_memory_bytes"] = peak_memory(
            (one.folder, one.engine), single, one.vocabulary, settings.threads
        )
    with contextlib.ExitStack() as stack:
        predictors: dict[str, Predictor] = {}
        for name, one in candidates.items():
            predictors[name] = one.open()
            stack.callback(predictors[name].close)
        _add_quality(found, predictors, candidates, next(iter(references), None), seed, progress)
        vocabulary = min(one.vocabulary for one in candidates.values())
        taken = time_calls(predictors, points, vocabulary, Timing(settings.rounds), seed, progress)
        _add_latency(found, taken, settings, references)
        if "energy" not in settings.leave_out:
            _add_energy(found, predictors, heavy, vocabulary, Meter(settings.watts_per_core, card), settings, progress)
    for figures in found.values():
        figures["cost_per_million"] = _cost(figures[f"throughput_per_s@{heavy}"], settings, heavy)
    return found


def _add_quality(
    found: dict[str, Figures],
    predictors: Mapping[str, Predictor],
    candidates: Mapping[str, Candidate],
    reference: str | None,
    seed: int,
    progress: Progress,
) -> None:
    sampled = {}
    for name, one in candidates.items():
        if one.labelled is None:
            continue
        task, examples = one.labelled.task, one.labelled.examples
        outputs = answers(predictors[name], examples, one.labelled.pad, one.quality_batch, progress)
        sampled[name] = resamples(task, outputs, examples, seed)
        found[name] |= quality(task, outputs, examples, sampled[name])
    if reference in sampled:
        for name in sampled.keys() - {reference}:
            found[name] |= difference(found[name], found[reference], sampled[name], sampled[reference], reference)


def _add_latency(
    found: dict[str, Figures], taken: Mapping[Point, Samples], settings: MeasureSettings, references: Sequence[str]
) -> None:
    for name, figures in found.items():
        figures |= latency_figures(taken, name, settings.threads)
        for reference in references:
            if name != reference:
                for point, samples in taken.items():
                    figures[f"speedup.{reference}@{point}"] = latency_ratio(samples[name], samples[reference])


def _add_energy(
    found: dict[str, Figures],
    predictors: Mapping[str, Predictor],
    point: Point,
    vocabulary: int,
    meter: Meter,
    settings: MeasureSettings,
    progress: Progress,
) -> None:
    arrays = random_arrays(point, vocabulary, seed=0)
    taken: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in progress.track(range(ENERGY_TURNS), "energy", total=ENERGY_TURNS):
        for name, predictor in predictors.items():
            items = 0
            with meter:
                while items == 0 or meter.elapsed < ENERGY_TURN_S:
                    predictor.run(arrays)
                    items += point.batch
            taken[name].append(meter.joules / items)
    for name, joules in taken.items():
        energy = quantile(joules, 0.5, "J", f"{meter.about}; at {point}, median of interleaved turns")
        found[name]["energy_j_per_item"] = energy
        found[name]["co2e_g_per_item"] = _scaled(
            energy,
            settings.grams_per_kwh / 3.6e6,
            "g",
            f"energy x {settings.grams_per_kwh:g} g CO2e a kWh; {energy.method}",
        )


def _cost(throughput: Measurement, settings: MeasureSettings, point: Point) -> Measurement:
    """Price of a million items on a machine that does nothing else."""

    def price(per_second: float | None) -> float | None:
        return None if per_second is None else settings.price_per_hour * 1e6 / (3600 * per_second)

    value = price(throughput.value)
    assert value is not None
    how = f"{settings.price_per_hour:g} an hour / throughput at {point} with {settings.threads} threads"
    return Measurement(
        value=value, unit="price", low=price(throughput.high), high=price(throughput.low), n=throughput.n, method=how
    )


def _scaled(figure: Measurement, factor: float, unit: str, method: str) -> Measurement:
    low, high = (None if side is None else side * factor for side in (figure.low, figure.high))
    return Measurement(value=figure.value * factor, unit=unit, low=low, high=high, n=figure.n, method=method)
