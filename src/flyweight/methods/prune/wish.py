"""Meeting a wish: what a table of costs promises is made, measured and corrected, until the result keeps it.

A table knows one block; a whole model has caches that the table's small models do not fill as it does, and a machine has its
noise. So the result races the reference, and where it misses the wish the table is asked for more (or, where accuracy was given
away for speed that nobody asked for, for less).

A wish is *met* when the 95 % lower bound of the measured speed-up is at least 0.97 of it. Of results that meet it, the largest of
those whose measured speed-up is between the wish and 1.05 of it is taken; else the fastest below the wish, else the largest.

A busy machine gives intervals that say nothing: a race goes on until its interval is narrow, or its time is up. A result whose
interval stayed wide is taken only where no other meets the wish, and it is said that it may be faster than was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

from flyweight.artifact import Measurement
from flyweight.context import NoProgress, Progress
from flyweight.errors import StepError

__all__ = ["SURE", "Met", "Race", "Take", "measured", "meet", "narrow"]

SURE = 0.97  # share of the wish that the lower bound must reach
AIM = 1.01  # a correction aims so far beyond the wish, or noise would miss it every other time
SPARE = 1.05  # beyond this share of the wish less is tried
TRIES = 4
PUSH = 1.04  # where what was asked for gave the same shapes again, so many times more is asked for
MOST_MADE = 3 * TRIES
FIRST, MOST = 8, 64  # rounds
NARROW = 1.15
"""An interval's high end is at most so many times its low end, or it is no measurement: what misses a wish (0.97) and what
overshoots it (1.05) lie 8 % apart, and an interval of twice that would hold both."""
LIMIT_S = 60.0
"""Seconds after which a race is not prolonged any more."""
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
        """The more the better: met as wished (the largest first), nearly (the fastest first), too fast (the largest first), met
        by an interval that says little (the largest first), not met (the fastest first).

        How large a shape is is told by the table: what was measured of two alike is in the order that noise gave it.
        """
        value = self.found.value
        if not self.met(wish):
            return 0, value
        if not narrow(self.found):
            return 1, -self.predicted
        if value > SPARE * wish:
            return 2, -self.predicted
        return (4, -self.predicted) if value >= wish else (3, value)

    def met(self, wish: float) -> bool:
        return _low(self.found) >= SURE * wish

    def notes(self) -> dict[str, Any]:
        told = {"factor": round(self.factor, 4), "predicted": round(self.predicted, 4), **_rounded(self.found)}
        return told | {"narrow": narrow(self.found)}


def meet(
    wish: float,
    make: Callable[[float], M],
    predict: Callable[[M], float],
    race: Race[M] | None = None,
    progress: Progress | None = None,
) -> Met[M]:
    """Make a model that is `wish` times as fast (or costs so many times less) as the reference. In the notes `narrow` says
    whether the interval is narrow enough to tell what is met from what is overshot.

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
            if any(one.met(wish) and one.found.value >= wish for one in tries):
                break  # there is none between what is fast enough and what is not
            factor *= PUSH
            continue
        if race is None:
            found = _counted(predicted)
        else:
            with race(made) as take:
                found = measured(take, wish)
        one = _Try(factor, predicted, found)
        tries.append(one)
        progress.note(f"asked for {factor:.2f}x, the table says {predicted:.2f}x, found {_text(found)}")
        if best is None or one.rank(wish) > best[0].rank(wish):
            best = one, made
        if race is None or len(tries) == TRIES or (one.met(wish) and wish <= found.value <= SPARE * wish):
            break
        factor = _corrected(tries, wish)
        if not (one.met(wish) or narrow(found)):  # it may be fast enough, or not: no reason to ask for less
            factor = max(factor, PUSH * one.factor)
    assert best is not None
    if not best[0].met(wish):
        raise _missed(wish, best[0], len(tries), no_smaller)
    if not narrow(best[0].found):
        progress.note(
            f"warning: the machine was too busy to measure well: {_text(best[0].found)} surely meets {wish:g}x, but more may "
            "have been removed than was needed; on a quiet machine run it again"
        )
    notes = {"wish": wish, **best[0].notes(), "tries": [one.notes() for one in tries]}
    return Met(best[1], best[0].factor, notes)


def measured(take: Take, wish: float | None = None) -> Measurement:
    """A few rounds; more of them while the interval is wide or leaves open whether the wish is met, if there is one."""
    start = time.monotonic()
    found = take(FIRST)
    while not _enough(found, wish) and time.monotonic() - start < LIMIT_S:
        found = take(min(found.n or FIRST, MOST))
    return found


def narrow(found: Measurement) -> bool:
    """Whether the interval is one to go by."""
    return found.low is not None and found.high is not None and found.high <= NARROW * found.low


def _enough(found: Measurement, wish: float | None) -> bool:
    if not narrow(found):
        return False
    if wish is None:
        return True
    high = found.value if found.high is None else found.high
    if _low(found) < SURE * wish:
        return high < SURE * wish  # surely missed
    return found.value >= wish or high < wish or (found.n or MOST) >= MOST


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
    if not narrow(best.found):
        hint = f"the machine is too busy to tell: try again when it is quiet, or {hint.removeprefix('no shape is smaller: ')}"
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
