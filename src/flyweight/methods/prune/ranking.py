"""In which order heads and neurons go, and what is lost when a block keeps so many: what every criterion comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flyweight.methods.prune import fisher, obs
from flyweight.methods.prune.restore import texts
from flyweight.methods.prune.scores import Group, Scores, groups, score
from flyweight.methods.prune.structured import Keep
from flyweight.training import checkpoint
from flyweight.training.device import weights

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["Losses", "Ranking", "losses_of", "rank"]

Losses = dict[Group, NDArray[np.float64]]
"""{group: [units + 1], what is lost when k of its units stay}"""


@dataclass(frozen=True)
class Ranking:
    """scores: small ones go first; losses: how large the loss then is, comparable over groups; gradients: with `fisher`"""

    scores: Scores
    losses: Losses
    gradients: fisher.Gradients | None = None

    def rearranged(self, keep: Keep) -> tuple[Keep, dict[str, float]]:
        """Other units, as many, that go better together: (units that stay, for the notes the loss expected before and after)."""
        assert self.gradients is not None
        found: Keep = {}
        before = after = 0.0
        for group, stay in keep.items():
            gradient, kept = self.gradients[group], set(stay)
            gone = [unit for unit in range(gradient.shape[1]) if unit not in kept]
            now = fisher.rearranged(fisher.information(gradient), gone) if gone else []
            found[group] = sorted(set(range(gradient.shape[1])) - set(now))
            before += fisher.expected(gradient, gone)
            after += fisher.expected(gradient, now)
        return found, {"expected": round(before, 6), "rearranged": round(after, 6)}


def rank(bundle: Bundle, settings: PruneSettings, context: Context) -> Ranking:
    """Heads and neurons of `settings.target` by `settings.criterion`.

    Losses: `fisher`, half the sum of what goes of F's diagonal (Kwon et al. 2022, eq. 6); `hessian`, the squared relative error
    of the output of the linear that reads the units, the rest made up for it (Kurtic et al. 2023, section 3.2); else the summed
    scores of what goes. What takes passes over texts is kept below `context.work`. Raises StepError as each criterion does.
    """
    if settings.criterion == "fisher":
        gradients = fisher.gradients(bundle, settings, context)
        scores = fisher.diagonal(gradients)
        return Ranking(scores, {group: losses / 2 for group, losses in losses_of(scores).items()}, gradients)
    if settings.criterion == "hessian":
        ordered, sizes = _ordered(bundle, settings, context), groups(bundle, settings.target)
        scores = {group: obs.score_of(ordered[group], size) for group, size in sizes.items()}
        return Ranking(scores, {group: _errors(ordered[group], size) for group, size in sizes.items()})
    scores = score(bundle, settings, context)
    return Ranking(scores, losses_of(scores))


def losses_of(scores: Scores) -> Losses:
    """Sums of the smallest scores, in float64."""
    found = {}
    for group, some in scores.items():
        lost = some.double().sort().values.cumsum(0).numpy()  # of 1, 2, ... units that went
        found[group] = np.concatenate([lost[::-1], [0.0]])
    return found


def _errors(ordered: obs.Ordered, units: int) -> NDArray[np.float64]:
    found = np.full(units + 1, np.nan)
    for gone, error in enumerate(ordered.errors):
        found[units - gone] = error**2
    found[0] = 1.0  # of what varies nothing is left; the mean stays, in the bias
    return found


def _ordered(bundle: Bundle, settings: PruneSettings, context: Context) -> Mapping[Group, obs.Ordered]:
    some = texts(settings, context)
    about = (settings.target, settings.damping, some.content_hash(), weights(bundle.model))
    folder, key = context.work / "order", checkpoint.content_hash("order", *about)
    kept: dict[str, Any] | None = checkpoint.load(folder, key, context.progress.note)
    if kept is None:
        found = obs.observed(bundle, some, settings.target, settings.damping, progress=context.progress)
        kept = {"key": key, "groups": {str(group): tuple(one) for group, one in found.items()}}
        checkpoint.save(folder, kept)
    return {group: obs.Ordered(*kept["groups"][str(group)]) for group in groups(bundle, settings.target)}
