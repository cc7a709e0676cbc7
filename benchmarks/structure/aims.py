"""What was aimed at, and whether it was reached: `met`, `not met`, or a dash where a row that it needs gave nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.aims import Line, at_most, judged, surely
from benchmarks.models import MINILM, MPNET
from benchmarks.structure import large
from benchmarks.structure.asks import ASKS, VOCABULARY, Ask, row_name
from benchmarks.structure.found import Found
from benchmarks.structure.rows import MEANT
from benchmarks.table import DASH, interval
from flyweight.artifact import Measurement

SURE = 0.97
"""Of a wish: what the lower bound of the measured speed-up has to reach."""
WITHIN = 0.25
"""By how much an estimate may be off."""


def ask_named(model: str, key: str) -> Ask:
    return next(ask for ask in ASKS if (ask.model.key, ask.key) == (model, key))


def lines(found: Found) -> Iterator[Line]:
    for key, wish, points in (("1.5x", 1.5, 1.5), ("2x", 2.0, None), ("4x", 4.0, 2.0), ("10x", 10.0, 4.0)):
        ask = ask_named(MPNET.key, key)
        what = f"{MPNET.title}, {key}"
        if points is not None:
            yield within(found, ask, points, f"{what}: points lost on Rotten Tomatoes")
        yield at_wish(found, ask, wish, f"{what}: speed over its fp32 at 1x128")
        if key == "1.5x":
            yield at_most(found, ask.row(0), "prune.seconds", 300, f"{what}: seconds of the whole command", "{:.0f}")
    student = ask_named(MPNET.key, "to-minilm")
    for control, than in (("minilm-alone", "for as many epochs"), ("minilm-fp32", "for 3 epochs")):
        what = f"MiniLM taught by {MPNET.title} minus MiniLM fine-tuned without a teacher {than}, points"
        yield above(found.over(student, control), student, what)
    for key, name in (("3l", "three layers"), ("2l", "two layers"), ("1l", "one layer"), ("half", "half the width")):
        ask = ask_named(MINILM.key, key)
        yield above(found.over(ask), ask, f"MiniLM, {name}: distilled minus its control, points")
    yield not_below(found, ask_named(MINILM.key, "3l"), "MiniLM, three layers minus six, points")
    yield from vocabulary(found)
    for key, (summary, *_) in large.WAYS.items():
        for name in ("time", "memory"):
            figure = found.figure(large.row_of(key), f"{name}_ratio")
            what = f"{large.TITLE}, {summary}: {name} / estimate"
            yield judged(figure, what, f"1 +- {WITHIN:g}", "{:.2f}", 1.0, lambda value: abs(value - 1) <= WITHIN)


def vocabulary(found: Found) -> Iterator[Line]:
    row, title = row_name(MINILM, VOCABULARY.key, 0), "MiniLM, a third of the vocabulary"
    yield within(found, VOCABULARY, 0.5, f"{title}: points lost on Rotten Tomatoes")
    yield at_most(
        found, row, "vocabulary.moved", 1e-5, f"{title}: largest change of a logit where all tokens stay", "{:.2g}"
    )
    for name, of in (("weights", "model.safetensors"), ("engine", "the engine's file")):
        figure = found.figure(row, f"vocabulary.{name}_ratio")
        what = f"{title}: bytes less in {of} / as computed"
        yield judged(figure, what, "1 +- 0.001", "{:.5f}", 1.0, lambda value: abs(value - 1) <= 0.001)


def within(found: Found, ask: Ask, points: float, what: str) -> Line:
    drop = found.drop(ask)
    return _told(
        surely(drop, what, f"lower bound >= -{points:g}", lambda low: low >= -points, "{:+.2f}", 100), drop, ask
    )


def at_wish(found: Found, ask: Ask, wish: float, what: str) -> Line:
    figure = found.first(ask, MEANT)
    return surely(figure, what, f"lower bound >= {SURE * wish:.4g}", lambda low: low >= SURE * wish, "{:.2f}")


def above(figure: Measurement | None, ask: Ask, what: str) -> Line:
    return _told(surely(figure, what, "lower bound > 0", lambda low: low > 0, "{:+.2f}", 100), figure, ask)


def not_below(found: Found, ask: Ask, what: str) -> Line:
    """By the difference itself: its interval is shown beside it."""
    drop = found.drop(ask)
    holds: Callable[[float], bool] = lambda value: value >= 0  # noqa: E731
    return _told(judged(drop, what, ">= 0", "{:+.2f}", 100, holds), drop, ask)


def _told(line: Line, figure: Measurement | None, ask: Ask) -> Line:
    """Told only when every seed has been run."""
    has = 0 if figure is None else figure.n or 0
    if has == len(ask.seeds):
        return line
    text = f"{interval(figure.model_dump(), '{:+.2f}', 100)} ({has} of {len(ask.seeds)} seeds)" if figure else DASH
    return line._replace(figure=text, met=None)
