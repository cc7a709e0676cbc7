"""Whether a result keeps enough of the reference's quality."""

from __future__ import annotations

from flyweight.artifact import Measurement, Verdict
from flyweight.settings import Accept

__all__ = ["accept"]


def accept(rule: Accept, reference: Measurement, difference: Measurement, metric: str = "quality") -> Verdict:
    """Hold the 95 % lower bound of the paired difference against the rule.

    reference:  the reference's metric; difference: result minus reference with its interval, in the same unit.
    Both limits of the rule, where both are set, must hold.
    """
    bound = difference.value if difference.low is None else difference.low
    cosine = reference.unit == "cosine"
    limits = []
    if rule.quality is not None:
        limits.append((-(1 - rule.quality) * reference.value, f"at least {100 * rule.quality:g} % of the reference's"))
    if rule.max_drop is not None:
        limits.append(
            (-rule.max_drop, f"at most {rule.max_drop if cosine else f'{100 * rule.max_drop:g} points'} lost")
        )
    result = reference.value + difference.value
    factor, places, points = (1, 5, "") if cosine else (100, 1, " points")
    seen = (
        f"{metric} {factor * result:.{places}f} against {factor * reference.value:.{places}f} of the reference, a difference "
        f"of {factor * difference.value:+.{places}f}{points} with a 95 % lower bound of {factor * bound:+.{places}f}"
    )
    if not limits:
        return Verdict(accepted=True, text=f"No acceptance rule was set: {seen}.")
    accepted = all(bound >= limit - 1e-12 for limit, _ in limits)
    wanted = " and ".join(f"{text} (a bound of {factor * limit:+.{places}f} or better)" for limit, text in limits)
    return Verdict(accepted=accepted, text=f"{'Accepted' if accepted else 'Not accepted'}: {seen}; asked for {wanted}.")
