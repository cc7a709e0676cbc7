"""A run's data, acceptance and measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from flyweight.settings.base import Positive, Settings

__all__ = ["Accept", "DataSettings", "MeasureSettings"]


class DataSettings(Settings):
    """Where the examples are and how to read them."""

    train: Path | None = None
    """Training examples: .jsonl, .csv, .parquet, or a folder written by `datasets`."""
    eval: Path | None = None
    """Held-out examples; nothing is tuned on them."""
    validation: Path | None = None
    """Examples for early stopping; by default `validation_share` of the training examples, chosen by hash."""
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the training examples held back for early stopping."""
    calibrate: Path | None = None
    """Texts to calibrate on, without labels; by default those of the training file. What is left over of it is measured on
    where a task without labels has no --eval."""
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of the second text, for pairs."""
    label: str = "label"
    """Column of the label."""
    max_length: int | None = Field(None, ge=4)
    """Longest input in tokens; by default the model's own limit."""
    truncate: bool = False
    """Cut texts that are longer than `max_length` instead of refusing them."""


class Accept(Settings):
    """The acceptance rule, held against the 95 % lower bound of the paired difference to the reference."""

    quality: float | None = Field(None, gt=0, le=1)
    """Keep at least this share of the reference's quality, e.g. 0.99."""
    max_drop: float | None = Field(None, ge=0, lt=1)
    """Lose at most this much of the metric, e.g. 0.01 for one point of accuracy."""


class MeasureSettings(Settings):
    """What is measured and on what terms."""

    threads: int = Field(1, ge=1)
    """CPU threads of the engine."""
    batches: tuple[Positive, ...] = Field((1, 32), min_length=1)
    """Batch sizes at which latency is taken."""
    lengths: tuple[Positive, ...] = Field((32, 128), min_length=1)
    """Input lengths in tokens at which latency is taken."""
    rounds: int = Field(30, ge=3)
    """Interleaved rounds a point (A B A B ...)."""
    price_per_hour: float = Field(0.10, ge=0)
    """Price of the machine an hour, for `cost_per_million`."""
    watts_per_core: float = Field(10.0, gt=0)
    """Assumed power of a busy core, where no energy counter can be read."""
    grams_per_kwh: float = Field(480.0, ge=0)
    """Carbon intensity of the grid in g CO2e per kWh."""
    engines: tuple[Literal["openvino"], ...] = ()
    """Further engines that the result is held against torch and measured in, beside onnxruntime."""
    leave_out: tuple[Literal["memory", "energy"], ...] = ()
    """Figures to leave out: each takes some seconds a model."""
    include_samples: bool = False
    """Let rows of the evaluation data appear in the report (off: no row of yours leaves your files)."""

    def within(self, longest: int) -> Self:
        """The same with lengths that a model of at most `longest` tokens takes."""
        return self.model_copy(update={"lengths": tuple(sorted({min(length, longest) for length in self.lengths}))})
