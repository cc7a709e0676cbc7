"""The one training loop (see `train`)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.errors import Interrupted, TrainingError
from flyweight.settings import TrainSettings
from flyweight.training import checkpoint
from flyweight.training.batches import Indices, grouped, share, tensors
from flyweight.training.device import accelerator, find_device, get_rng, kept_rng, seeded, set_rng, weights
from flyweight.training.interrupt import Interrupt
from flyweight.training.objective import Objective

__all__ = ["TrainResult", "learning_rate_factor", "train"]

CHECKPOINT_SECONDS = 60.0
"""A checkpoint is written at evaluations and when the last one is this old."""


@dataclass(frozen=True)
class TrainResult:
    """What a training did.

    steps:        optimizer steps in all (before an early stop)
    best_metric:  the metric of the weights that the model now has; None without evaluation
    best_step:    the step that they are from
    history:      one entry an evaluation: step, epoch, loss (mean since the last entry), metric
    resumed_from: step of the checkpoint that this run began with, 0 for none
    stopped:      patience ran out
    """

    steps: int
    best_metric: float | None
    best_step: int
    history: list[dict[str, float]]
    resumed_from: int
    stopped: bool

    def notes(self) -> dict[str, Any]:
        """What goes into the artifact's record of the step: numbers only."""
        return {
            "steps": self.steps,
            "best_metric": self.best_metric,
            "best_step": self.best_step,
            "stopped_early": self.stopped,
            "history": self.history,
        }


def learning_rate_factor(step: int, total: int, warmup: float, schedule: str) -> float:
    """Share of the peak learning rate in step `step` (from 0) of `total`.

    Rises linearly over the first round(warmup * total) steps, without one at 0 that would be wasted, then falls
    linearly or as half a cosine so that it would be 0 in step `total`.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    through = (step - rising) / max(total - rising, 1)
    return 1.0 - through if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * through))


def train(
    model: nn.Module,
    objective: Objective,
    data: Examples,
    settings: TrainSettings,
    *,
    seed: int,
    pad: int,
    work: Path | None = None,
    evaluate: Callable[[], float] | None = None,
    progress: Progress | None = None,
    device: str | None = None,
    what: str = "training",
    key: str = "",
) -> TrainResult:
    """Train `model` in place with AdamW; it ends with its best weights, or without `evaluate` with its last.

    work:     folder of the checkpoint. A call with the same arguments goes on where a killed one was and ends bit for bit
              where it would have ended (one process, same machine); a finished one returns at once. None: no checkpoints.
    evaluate: the metric now, higher is better; nan = these weights are no candidate for the best. The model is in the
              mode it was left in: use `predict`, which sees to that.
    key:      whatever else the result depends on, so that a checkpoint of other work is not taken for this one's

    Global random state and accelerate's state are left as they were. Raises TrainingError (loss or gradient is not
    finite; no examples), StorageError (no room for a checkpoint), Interrupted (Ctrl-C; says how to go on).
    """
    if not len(data):
        raise TrainingError("at least one example to train on", "none")
    where = find_device(device)
    origin, training = next(model.parameters()).device, model.training
    with seeded(seed), accelerator(where) as helper, Interrupt() as interrupt:
        loop = _Loop(model, objective, data, settings, seed, pad, work, helper)
        loop.evaluate, loop.progress, loop.what = evaluate, progress or NoProgress(), what
        loop.interrupt = interrupt
        try:
            loop.prepare(key)
            return loop.run()
        finally:
            loop.module.to(origin)
            model.train(training)


class _Whole(nn.Module):
    """The model and the objective's own parameters as one module whose forward is the loss.

    So that accelerate can wrap everything that has gradients at once, and DistributedDataParallel's forward is what
    the objective runs in.
    """

    def __init__(self, model: nn.Module, objective: Objective, groups: list[dict[str, Any]]) -> None:
        super().__init__()
        self.model = model
        known = {id(parameter) for parameter in model.parameters()}
        grouped_ones = [parameter for group in groups for parameter in group["params"]]
        self.own = nn.ParameterList(parameter for parameter in grouped_ones if id(parameter) not in known)
        self._loss = objective.loss

    def forward(self, batch: dict[str, Tensor], indices: Indices) -> Tensor:
        return self._loss(batch, indices)


@dataclass
class _Position:
    """Where a training is, in plain values. Epoch and place in it follow from `step`."""

    step: int = 0
    evaluated: int = 0
    worse: int = 0
    stopped: bool = False
    best: float | None = None
    best_step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


class _Loop:
    evaluate: Callable[[], float] | None
    progress: Progress
    what: str
    interrupt: Interrupt

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: Examples,
        settings: TrainSettings,
        seed: int,
        pad: int,
        work: Path | None,
        helper: Any,
    ) -> None:
        self.model, self.objective, self.data, self.settings = model, objective, data, settings
        self.seed, self.pad, self.work, self.helper = seed, pad, work, helper
        self.per_epoch = math.ceil(len(data) / settings.batch_size)
        self.total = math.ceil(settings.epochs * self.per_epoch)
        if settings.max_steps is not None:
            self.total = min(self.total, settings.max_steps)
        groups = objective.parameter_groups()
        self.module = _Whole(model, objective, groups)
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.groups = groups
        self.at = _Position()
        self.best_weights: dict[str, Tensor] = {}
        self.saved_at, self.saved_step, self.resumed_from = time.monotonic(), -1, 0
        self.epoch, self.batches = -1, list[Indices]()

    # preparation

    def prepare(self, key: str) -> None:
        start = {} if self.work is None else weights(self.module)
        self.key = checkpoint.content_hash(
            [1, type(self.settings).__name__, self.settings.model_dump(mode="json"), self.seed, self.pad, key],
            self.data.content_hash(),
            self.objective.state_dict(),
            start,
        )
        self.ready = self.helper.prepare_model(self.module)
        # fused: one pass over memory instead of ten, a fifth of the time on a CPU
        adam = torch.optim.AdamW(self.groups, lr=self.settings.learning_rate, fused=True)
        self.optimizer = self.helper.prepare_optimizer(adam)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        if self.work is None:
            return
        state = checkpoint.load(self.work, self.key, self.progress.note)
        if state is not None:
            self._restore(state)
            self.progress.note(f"{self.what}: going on from step {self.at.step} of {self.total}")
        elif self.helper.is_main_process:
            trained = sum(parameter.numel() * parameter.element_size() for parameter in self.trained)
            # weights, two moments, best weights; the old file stays until the new one is whole
            checkpoint.require_room(self.work, 2 * (4 if self.evaluate else 3) * trained)

    def _restore(self, state: dict[str, Any]) -> None:
        self.at = _Position(**state["position"])
        _copy(state["weights"], self.module)
        self.optimizer.load_state_dict(state["optimizer"])
        self.objective.load_state_dict(state["objective"])
        self.best_weights = state["best_weights"]
        if self.helper.scaler is not None:
            self.helper.scaler.load_state_dict(state["scaler"])
        set_rng(state["rng"])
        self.resumed_from = self.saved_step = self.at.step

    # the loop

    def run(self) -> TrainResult:
        at = self.at
        try:
            if self._due(at.step) and at.evaluated < at.step:  # stopped between a step and its evaluation
                self._evaluate()
            if not at.stopped:
                self._steps()
            if self.saved_step < at.step:
                self._save()
        except KeyboardInterrupt:
            self.interrupt.ignore()
            raise Interrupted(self._goodbye(self.interrupt.torn)) from None
        if self.best_weights:
            _copy(self.best_weights, self.module)
        best_step = at.best_step if self.best_weights else at.step
        return TrainResult(at.step, at.best, best_step, at.history, self.resumed_from, at.stopped)

    def _steps(self) -> None:
        at = self.at
        left = range(at.step, self.total)
        for _ in self.progress.track(left, self.what, total=self.total, done=at.step):
            with self.interrupt.held():
                self._step()
            if self._due(at.step):
                self._evaluate()
            elif time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS:
                self._save()
            if at.step % max(self.total // 20, 1) == 0 and at.loss_count:
                self.progress.note(f"step {at.step} of {self.total}: loss {at.loss_sum / at.loss_count:.4f}")
            if at.stopped:
                break

    def _step(self) -> None:
        at, settings = self.at, self.settings
        factor = learning_rate_factor(at.step, self.total, settings.warmup, settings.schedule)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        indices, weight = share(self._batch(), self.helper.process_index, self.helper.num_processes)
        self.ready.train()
        loss = self.ready(tensors(self.data, indices, self.pad, self.helper.device), indices) * weight
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._not_finite("loss", value)
        self.helper.backward(loss)
        norm = float(self.helper.clip_grad_norm_(self.trained, settings.clip))
        if not math.isfinite(norm) and self.helper.scaler is None:  # a scaler skips such steps by itself
            raise self._not_finite("gradient", norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        at.step += 1
        at.loss_sum, at.loss_count = at.loss_sum + value, at.loss_count + 1
        self.objective.after_step(at.step, self.total)

    def _batch(self) -> Indices:
        epoch, place = divmod(self.at.step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.batches = grouped(self.data.lengths, self.settings.batch_size, self.seed, epoch)
        return self.batches[place]

    # evaluation and checkpoints

    def _due(self, step: int) -> bool:
        if step == 0:
            return False
        often = self.settings.evaluations_per_epoch
        return step == self.total or step * often // self.per_epoch > (step - 1) * often // self.per_epoch

    def _evaluate(self) -> None:
        """Take the metric, keep the weights if they are the best, save."""
        at = self.at
        entry = {"step": at.step, "epoch": at.step / self.per_epoch, "loss": at.loss_sum / max(at.loss_count, 1)}
        line = f"step {at.step} of {self.total}: loss {entry['loss']:.4f}"
        metric = None
        if self.evaluate is not None:
            with kept_rng():
                metric = float(self.evaluate())
            line += "" if math.isnan(metric) else f", validation {metric:.4f}"
        with self.interrupt.held():
            at.history.append(entry)
            at.evaluated, at.loss_sum, at.loss_count = at.step, 0.0, 0
            if metric is not None and not math.isnan(metric):
                entry["metric"] = metric
                if at.best is None or metric > at.best:
                    at.best, at.best_step, at.worse = metric, at.step, 0
                    self.best_weights = {
                        name: value.detach().cpu().clone() for name, value in weights(self.module).items()
                    }
                else:
                    at.worse += 1
                    at.stopped = self.settings.patience is not None and at.worse >= self.settings.patience
        self.progress.note(line)
        self._save()

    def _save(self) -> None:
        """Write the checkpoint, unless the weights are no longer finite: the last good one stays."""
        for name, value in self.module.named_parameters():
            if not bool(torch.isfinite(value).all()):
                raise self._not_finite(f"weight ({name.removeprefix('model.')})", math.nan)
        if self.work is None or not self.helper.is_main_process:
            return
        state = {
            "key": self.key,
            "position": asdict(self.at),
            "weights": weights(self.module),
            "best_weights": self.best_weights,
            "optimizer": self.optimizer.state_dict(),
            "objective": self.objective.state_dict(),
            "scaler": None if self.helper.scaler is None else self.helper.scaler.state_dict(),
            "rng": get_rng(),
        }
        checkpoint.save(self.work, state)
        self.saved_at, self.saved_step = time.monotonic(), self.at.step

    def _goodbye(self, torn: bool) -> str:
        if self.work is None:
            return f"{self.what} stopped at step {self.at.step} of {self.total}; nothing was kept"
        if not torn:
            self._save()
        if self.saved_step < 0:
            return f"{self.what} stopped before its first checkpoint; run the same command again"
        return (
            f"{self.what} stopped; its state at step {self.saved_step} of {self.total} is kept: "
            "run the same command again to go on from there"
        )

    def _not_finite(self, thing: str, value: float) -> TrainingError:
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        kept = ""
        if self.saved_step >= 0 and self.work is not None:
            kept = f"; the last good checkpoint (step {self.saved_step}) stays at {self.work / checkpoint.FILE}"
        step = self.at.step + (0 if thing.startswith("weight") else 1)
        return TrainingError(
            f"a finite {thing} at step {step} of {self.total}",
            f"{value} at learning rate {rate:.3g}",
            f"lower learning_rate or clip, or lengthen warmup{kept}",
        )


@torch.no_grad()
def _copy(source: dict[str, Tensor], module: nn.Module) -> None:
    for name, value in weights(module).items():
        value.copy_(source[name])
