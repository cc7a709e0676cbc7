"""How fast the model is here and what it keeps in memory: timed, and counted, on a few texts of the data's mean length."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flyweight.context import NoProgress
from flyweight.data import Examples
from flyweight.measure.work import Rates, best_of, machine_rates
from flyweight.methods.prune.fisher import OwnAnswer
from flyweight.methods.prune.scores import visit
from flyweight.models import surgery
from flyweight.training.device import kept_rng

if TYPE_CHECKING:
    from flyweight.job import Job
    from flyweight.models.bundle import Bundle

__all__ = ["Needs", "Speed", "mean_length", "timed"]

TEXTS, LEAST = 16, 4
LONG_S = 1.6  # a pass that takes longer is timed on fewer texts
UPDATED = 1.3e-8  # seconds a weight and step of AdamW, where it is not timed


class Needs(NamedTuple):
    """What has to be timed beside forward passes. gates: the target whose gates take gradients; width: of matrices that are
    solved, 0 for none"""

    training: bool = False
    gates: str | None = None
    width: int = 0


class Speed(NamedTuple):
    """rates: of all kinds of work; texts, length: of the batch that passes were timed on

    saved: bytes a token that a training pass keeps for the way back; gate_saved: the same where only gates take gradients
    """

    rates: Rates
    texts: int
    length: int
    weights: int
    saved: float = 0.0
    gate_saved: float = 0.0

    @property
    def forward(self) -> float:
        """Seconds an example in a batch of 16."""
        return self.rates.passes / TEXTS + self.length * self.rates.tokens

    @property
    def training(self) -> float:
        """The same with gradients, and its share of an update after 32 examples."""
        there = self.rates.back_passes / TEXTS + self.length * self.rates.back_tokens
        return self.forward + there + (self.rates.updates or UPDATED) * self.weights / 32


def timed(job: Job, needs: Needs) -> Speed:
    """Takes some seconds, with large models half a minute where training is timed."""
    model = job.bundle.model
    length = max(2, round(mean_length(job)))
    weights = sum(one.numel() for one in model.parameters())
    training = model.training
    try:
        with kept_rng():
            model.train(False)
            run = _Runs(job, length)
            run.forward(1)
            alone = best_of(lambda: run.forward(1))
            texts = int(np.clip(LONG_S / max(alone, 1e-9), LEAST, TEXTS))
            found: dict[str, float] = {}
            found["passes"], found["tokens"] = _line(alone, best_of(lambda: run.forward(texts)), texts, length)
            saved = gate_saved = 0.0
            if needs.training:
                model.train(True)
                with counted(model) as kept:
                    run.there_and_back(2)
                saved = kept[0] / (2 * length)
                model.train(True)
                whole = best_of(lambda: run.there_and_back(1)), best_of(lambda: run.there_and_back(texts))
                line = _line(*whole, texts, length)
                found["back_passes"] = max(line[0] - found["passes"], 0.0)
                found["back_tokens"] = max(line[1] - found["tokens"], 0.0)
            model.train(False)
            if needs.gates is not None:
                found["gated"], gate_saved = _gated(job, needs.gates, texts, length, found["passes"])
            if needs.width or needs.training:
                found |= machine_rates(needs.width)
    finally:
        model.train(training)
    return Speed(Rates.of(**found), texts, length, weights, saved, gate_saved)


def mean_length(job: Job) -> float:
    for part in (job.splits.train, job.splits.calibration, job.splits.eval):
        if part is not None:
            return float(part.lengths.mean())
    return float(job.recipe.measure.within(job.bundle.encoder.max_length).lengths[-1])


def _line(one: float, many: float, texts: int, length: int) -> tuple[float, float]:
    """(seconds a pass, seconds a token) through two points."""
    slope = (many - one) / ((texts - 1) * length)
    if slope <= 0 or slope * length > one:
        return 0.0, many / (texts * length)
    return one - slope * length, slope


class _Runs:
    def __init__(self, job: Job, length: int) -> None:
        self.job, self.length = job, length

    def arrays(self, texts: int) -> dict[str, Tensor]:
        vocabulary = self.job.bundle.model.config.vocab_size
        ids = torch.from_numpy(np.random.default_rng(0).integers(1, vocabulary, (texts, self.length)))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def answer(self, texts: int) -> Tensor:
        arrays = self.arrays(texts)
        return self.job.task.answer(self.job.bundle.model(**arrays), arrays)

    def forward(self, texts: int) -> None:
        with torch.no_grad():
            self.answer(texts)

    def there_and_back(self, texts: int) -> None:
        with torch.enable_grad():
            self.answer(texts).sum().backward()  # type: ignore[no-untyped-call]
        self.job.bundle.model.zero_grad(set_to_none=True)


@contextmanager
def counted(model: torch.nn.Module) -> Iterator[list[int]]:
    """While inside, [0] is how many bytes forward passes keep for the way back, weights aside."""
    seen: dict[int, int] = {}
    weights = {one.untyped_storage().data_ptr() for one in model.parameters()}
    found = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and seen.get(storage.data_ptr()) != storage.nbytes():
            seen[storage.data_ptr()] = storage.nbytes()  # all are held until the way back, so no place is used twice
            found[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


class _Counting:
    """A loss whose forward pass is looked into."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.inner, self.bytes = bundle, OwnAnswer(bundle, 0), 0

    def loss(self, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        with counted(self.bundle.model) as kept:
            found = self.inner.loss(batch, indices)
        self.bytes = max(self.bytes, kept[0])
        return found


def _gated(job: Job, target: str, texts: int, length: int, once: float) -> tuple[float, float]:
    """(seconds a token there and back to gates, bytes a token that are kept meanwhile)."""
    bundle = job.bundle
    ids = np.random.default_rng(0).integers(1, bundle.model.config.vocab_size, texts * length).astype(np.int32)
    data = Examples(ids, None, np.arange(0, texts * length + 1, length, dtype=np.int64), None)
    counting = _Counting(bundle)

    def run(loss: Any) -> None:
        visit(bundle, target, loss, data, lambda *_: None, NoProgress(), "timing")

    run(counting)
    seconds = best_of(lambda: run(counting.inner))
    return max(seconds - 2 * once, 0.0) / (texts * length), counting.bytes / (texts * length)


def widths(bundle: Bundle) -> list[int]:
    """Of what the linears of the blocks read."""
    return [surgery.weight_2d(linear).shape[1] for linear in surgery.linears(bundle.model, bundle.family).values()]
