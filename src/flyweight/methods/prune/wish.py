"""Meeting a wish: what a table of costs promises is made, measured and corrected, until the result keeps it.

A table knows one block; a whole model has caches that the table's small models do not fill as it does, and a machine has its
noise. So the result races the reference, and where it misses the wish the table is asked for more (or, where accuracy was given
away for speed that nobody asked for, for less).

A wish is *met* when the 95 % lower bound of the measured speed-up is at least 0.97 of it. Of results that meet it, the least
fast of those whose measured speed-up is the wish or more is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from flyweight.artifact import Measurement
from flyweight.context import NoProgress, Progress
from flyweight.errors import StepError

__all__ = ["Met", "Race", "Take", "meet"]

SURE = 0.97  # share of the wish that the lower bound must reach
AIM = 1.01  # a correction aims so far beyond the wish, or noise would miss it every other time
SPARE = 1.05  # beyond this share of the wish less is tried
TRIES = 4
PUSH = 1.04  # where what was asked for gave the same shapes again, so many times more is asked for
MOST_MADE = 3 * TRIES
FIRST, MOST = 8, 64  # rounds
PLAUSIBLE = (0.3, 3.0)  # change of the measured share of time for that of the predicted one; else noise moved it
LEAST_FACTOR = 1.001

M = TypeVar("M")
Take = Callable[[int], Measurement]
"""Runs so many further rounds; gives the speed-up over all rounds so far, `n` of them, with its 95 % interval."""
Race = Callable[[M], AbstractContextManager[Take]]
"""Opens a model beside the reference (`flyweight.measure.race.Race.against`)."""


@dataclass(frozen=True)
class Met(Generic[M]):
    """model: the result; factor: what the table was asked for; notes: JSON, all tries and what was reached"""

    model: M
    factor: float
    notes: dict[str, Any]


class _Try(NamedTuple):
    factor: float
    predicted: float
    found: Measurement

    def rank(self, wish: float) -> tuple[int, float]:
        """The more the better: met and as fast as wished (the least fast first), met, not met (the fastest first)."""
        value = self.found.value
        if not self.met(wish):
            return 0, value
        return (2, -value) if value >= wish else (1, value)

    def met(self, wish: float) -> bool:
        return _low(self.found) >= SURE * wish

    def notes(self) -> dict[str, Any]:
        return {"factor": round(self.factor, 4), "predicted": round(self.predicted, 4), **_rounded(self.found)}


def meet(
    wish: float,
    make: Callable[[float], M],
    predict: Callable[[M], float],
    race: Race[M] | None = None,
    progress: Progress | None = None,
) -> Met[M]:
    """Make a model that is `wish` times as fast (or costs so many times less) as the reference.

    make:    a model that the table calls so many times as fast. At most 4 such are measured, some more made: let it cut alone,
             and leave what does not change shapes for later. Raises StepError where no shape is so small (`shapes.choose`)
    predict: what the table says of a model that was made
    race:    measures it; None where costs are counted (FLOPs, bytes), which the table does exactly

    Raises StepError: of `make`, at the first try; where no try met the wish, with what was reached.
    """
    progress = progress or NoProgress()
    tries: list[_Try] = []
    best: tuple[_Try, M] | None = None
    factor, no_smaller = wish, False
    for _ in range(MOST_MADE):
        try:
            made = make(factor)
        except StepError:
            if best is None:
                raise
            no_smaller = True
            break
        predicted = predict(made)
        if any(abs(one.predicted - predicted) < 1e-9 * predicted for one in tries):  # shapes come in steps
            if best is not None and best[0].found.value >= wish:
                break  # there is none between what is fast enough and what is not
            factor *= PUSH
            continue
        found = _counted(predicted) if race is None else _raced(race, made, wish)
        one = _Try(factor, predicted, found)
        tries.append(one)
        progress.note(f"asked for {factor:.2f}x, the table says {predicted:.2f}x, found {_text(found)}")
        if best is None or one.rank(wish) > best[0].rank(wish):
            best = one, made
        if race is None or len(tries) == TRIES or (one.met(wish) and wish <= found.value <= SPARE * wish):
            break
        factor = _corrected(tries, wish)
    assert best is not None
    if not best[0].met(wish):
        raise _missed(wish, best[0], len(tries), no_smaller)
    notes = {"wish": wish, **best[0].notes(), "tries": [one.notes() for one in tries]}
    return Met(best[1], best[0].factor, notes)


def _raced(race: Race[M], made: M, wish: float) -> Measurement:
    """A few rounds; more of them while they leave open whether the wish is met."""
    with race(made) as take:
        found = take(FIRST)
        while (found.n or MOST) < MOST and _open(found, wish):
            found = take(found.n or FIRST)
    return found


def _open(found: Measurement, wish: float) -> bool:
    low, high = _low(found), found.value if found.high is None else found.high
    surely_met = low >= SURE * wish and (found.value >= wish or high < wish)
    return not surely_met and high >= SURE * wish


def _corrected(tries: Sequence[_Try], wish: float) -> float:
    """What to ask the table for next.

    With one try the measured share of time is taken to be proportional to the predicted one; with more the line through the two
    nearest to the wish is followed, as a part of the time that no cut touches bends the proportion.
    """
    wanted = 1 / (AIM * wish)
    last = tries[-1]
    share = wanted * last.found.value / last.predicted
    if len(tries) > 1:
        one, other = sorted(tries, key=lambda tried: abs(1 / tried.found.value - wanted))[:2]
        slope = (1 / other.found.value - 1 / one.found.value) / (1 / other.predicted - 1 / one.predicted)
        if PLAUSIBLE[0] <= slope <= PLAUSIBLE[1]:
            share = 1 / one.predicted + (wanted - 1 / one.found.value) / slope
    return max(1 / share, LEAST_FACTOR) if share > 0 else 2 * last.factor


def _missed(wish: float, best: _Try, tries: int, no_smaller: bool) -> StepError:
    many = f"the best of {tries} tries" if tries > 1 else "the only try"
    hint = "no shape is smaller: ask for less, or prune layers first" if no_smaller else "ask for less"
    return StepError(
        f"a result {wish:g}x as fast as the reference (95 % lower bound at least {SURE * wish:.3g}x)",
        f"{_text(best.found)} as {many}",
        hint,
    )


def _counted(predicted: float) -> Measurement:
    return Measurement(value=predicted, low=predicted, high=predicted, unit="x", method="counted")


def _low(found: Measurement) -> float:
    """Without a bound nothing is sure."""
    return 0.0 if found.low is None else found.low


def _text(found: Measurement) -> str:
    if found.low is None or found.high is None or found.low == found.high:
        return f"{found.value:.2f}x"
    return f"{found.value:.2f}x ({found.low:.2f} to {found.high:.2f})"


def _rounded(found: Measurement) -> dict[str, Any]:
    low, high = (None if side is None else round(side, 4) for side in (found.low, found.high))
    return {"speedup": round(found.value, 4), "low": low, "high": high, "rounds": found.n}
