"""A tiny model and examples that it can learn, for the tests of training. Run as a program it trains in a process of its own:

python training_cases.py MODEL_FOLDER WORK_FOLDER KILL_AT -> one line of JSON, see `main`
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flyweight.data import Examples, pack
from flyweight.models.bundle import Bundle
from flyweight.models.load import load
from flyweight.settings import FinetuneSettings
from flyweight.tasks import task_named
from flyweight.training import TaskObjective, TrainResult, loop, train, validation

SETTINGS = FinetuneSettings(epochs=2, batch_size=8, learning_rate=1e-3, evaluations_per_epoch=2)


def open_bundle(folder: Path, task: str = "text-classification", dropout: float = 0.1) -> Bundle:
    bundle = load(folder, task_named(task))
    for module in bundle.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return bundle


def examples(count: int, seed: int = 0, low: int = 3, high: int = 20, labels: bool = True) -> Examples:
    """Random tokens; the label says which of two halves of the vocabulary most of them come from."""
    chance = np.random.default_rng(seed)
    answers = chance.integers(0, 2, count)
    encoded = []
    for answer in answers:
        length = int(chance.integers(low, high))
        halves = np.where(chance.random(length) < 0.9, answer, 1 - answer)
        encoded.append(((10 + 40 * halves + chance.integers(0, 40, length)).tolist(), None))
    return pack(encoded, answers if labels else None)


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


class Hooked(TaskObjective):
    """The task's loss, with something that happens after a step or in place of the loss."""

    def __init__(self, bundle: Bundle, settings: Any, after: Any = None, spoil: Any = None) -> None:
        super().__init__(bundle, settings)
        self.after, self.spoil, self.calls = after, spoil, 0

    def loss(self, batch: dict[str, torch.Tensor], indices: np.ndarray) -> torch.Tensor:
        self.calls += 1
        loss = super().loss(batch, indices)
        return loss if self.spoil is None else self.spoil(loss, self.calls)

    def after_step(self, step: int, total: int) -> None:
        if self.after is not None:
            self.after(step)


class Notes:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def track(self, items: Any, what: str, total: int | None = None, done: int = 0) -> Any:
        self.lines.append(f"track {what} {done}/{total}")
        yield from items

    def note(self, text: str) -> None:
        self.lines.append(text)


class Stop(Notes):
    """Interrupts the run named `what` at a step, as a user does."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__()
        self.what, self.step, self.now = what, step, ""

    def track(self, items: Any, what: str, total: int | None = None, done: int = 0) -> Any:
        for item in items:
            self.now = what
            yield item

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith(f"step {self.step} ") and self.now == self.what:
            raise KeyboardInterrupt


def run(bundle: Bundle, work: Path | None, after: Any = None, settings: Any = SETTINGS, **more: Any) -> TrainResult:
    """84 examples, 11 batches an epoch."""
    objective = Hooked(bundle, settings, after, more.pop("spoil", None))
    data = more.pop("data", None)
    data = examples(84) if data is None else data
    more = {"evaluate": validation(bundle, examples(30, seed=1)), "device": "cpu"} | more
    return train(bundle.model, objective, data, settings, seed=3, pad=bundle.encoder.pad, work=work, **more)


def main(folder: str, work: str, kill_at: str) -> None:
    """Prints hash and history of a training whose process kills itself within step KILL_AT (0: never)."""
    loop.CHECKPOINT_SECONDS = 0.0

    def kill(step: int) -> None:
        if step == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    bundle = open_bundle(Path(folder))
    result = run(bundle, Path(work), kill)
    found = {"hash": weights_hash(bundle.model), "history": result.history, "resumed": result.resumed_from}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
