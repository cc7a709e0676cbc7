"""What it costs to lose each part of a model, as figures with paired intervals. Neither measures nor needs torch."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from flyweight.measure.quality import RESAMPLES

__all__ = ["Harm", "Kind", "Part", "Span", "signed", "spans"]

Kind = Literal["head", "neurons", "attention", "feed-forward", "layer"]
CHUNK = 2**21  # drawn rows at a time: 16 MB of indices


class Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Span(Figures):
    """A mean over the examples with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.low <= 0 <= self.high


class Part(Figures):
    """What is lost at once, and what that costs.

    stack, block: where it is; attention: which of the block's attentions (0 self, 1 cross)
    number:  a head's position among those there are now, as surgery counts; a group's place, 0 for the neurons that write most
    head:    the head's number in the uncut model
    neurons: positions of the group's neurons
    weights: how many go when the part is cut out
    cost:    of losing it, see `Harm.cost`
    change:  of `Harm.metric`
    """

    kind: Kind
    stack: str
    block: int
    attention: int | None = None
    number: int | None = None
    head: int | None = None
    neurons: tuple[int, ...] | None = None
    weights: int
    cost: Span
    change: Span | None = None

    @property
    def name(self) -> str:
        """`encoder 3, head 5`, `decoder 0, cross-attention`."""
        crossed = "cross-" if self.attention else ""
        what = {
            "head": f"{crossed}head {self.head}",
            "neurons": f"neuron group {self.number}",
            "attention": f"{crossed}attention",
            "feed-forward": "feed-forward",
            "layer": "whole layer",
        }
        return f"{self.stack} {self.block}, {what[self.kind]}"


class Harm(Figures):
    """Every part of a model by what losing it alone costs.

    cost:     what the parts' cost is: `rise of the loss`, `1 - cosine` or `KL divergence`
    metric:   what their change is of: the task's metric, `same answer`, or None
    whole:    loss and metric of the whole model, where there are labels
    examples: how many, with `tokens` together
    groups:   of neurons in a block, at most
    seconds:  what it took; `expected`: what one timed pass let expect
    """

    task: str
    cost: str
    metric: str | None
    whole: dict[str, float]
    examples: int
    tokens: int
    groups: int
    expected: float
    seconds: float
    parts: tuple[Part, ...]

    def of(self, kind: Kind, stack: str | None = None) -> list[Part]:
        """In the model's order."""
        return [part for part in self.parts if part.kind == kind and stack in (None, part.stack)]

    def extremes(self, kind: Kind, most: int) -> tuple[list[Part], list[Part]]:
        """(those that cost most, dearest first; those that cost least, cheapest first), up to `most` each, none in both."""
        ranked = sorted(self.of(kind), key=lambda part: -part.cost.value)
        upper = min(most, (len(ranked) + 1) // 2)
        return ranked[:upper], ranked[upper:][::-1][:most]

    def stacks(self) -> list[str]:
        return list(dict.fromkeys(part.stack for part in self.parts))


def signed(value: float) -> str:
    """`+0.0123`; what four places cannot show as `+1.2e-05`."""
    return f"{value:+.1e}" if 0 < abs(value) < 0.00095 else f"{value:+.4f}" if value else "0"


def spans(differences: NDArray[Any], seed: int = 0, number: int = RESAMPLES) -> list[Span]:
    """Means of paired differences [parts, n] with percentile-bootstrap 95 % intervals (Efron and Tibshirani 1993, ch. 13).

    All parts share the resamples of the examples, those of `measure.quality.resamples` for the same seed.
    """
    values = np.asarray(differences, np.float64)
    parts, n = values.shape
    generator = np.random.default_rng(seed)
    size = max(1, CHUNK // n)
    sampled = np.empty((number, parts))
    for start in range(0, number, size):
        rows = generator.integers(0, n, (min(size, number - start), n))
        counts = np.zeros((len(rows), n))
        np.add.at(counts, (np.arange(len(rows))[:, None], rows), 1.0)
        sampled[start : start + len(rows)] = counts @ values.T / n
    low, high = np.percentile(sampled, [2.5, 97.5], axis=0)
    return [
        Span(value=float(v), low=float(a), high=float(b)) for v, a, b in zip(values.mean(1), low, high, strict=True)
    ]
