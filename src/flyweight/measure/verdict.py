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
    limits = []
    if rule.quality is not None:
        limits.append((-(1 - rule.quality) * reference.value, f"at least {100 * rule.quality:g} % of the reference's"))
    if rule.max_drop is not None:
        limits.append((-rule.max_drop, f"at most {100 * rule.max_drop:g} points lost"))
    result = reference.value + difference.value
    seen = (
        f"{metric} {100 * result:.1f} against {100 * reference.value:.1f} of the reference, "
        f"a difference of {100 * difference.value:+.1f} points with a 95 % lower bound of {100 * bound:+.1f}"
    )
    if not limits:
        return Verdict(accepted=True, text=f"No acceptance rule was set: {seen}.")
    accepted = all(bound >= limit - 1e-12 for limit, _ in limits)
    wanted = " and ".join(f"{text} (a bound of {100 * limit:+.1f} or better)" for limit, text in limits)
    return Verdict(accepted=accepted, text=f"{'Accepted' if accepted else 'Not accepted'}: {seen}; asked for {wanted}.")
