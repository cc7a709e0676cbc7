"""Every setting there is. One frozen class a step; its fields are the flags, the YAML keys and the reference pages.

Nothing here imports torch: listing steps and printing help must stay cheap.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from flyweight.errors import SettingsError, nearest

__all__ = [
    "Accept",
    "DataSettings",
    "DistillSettings",
    "FinetuneSettings",
    "MeasureSettings",
    "PruneSettings",
    "QuantizeSettings",
    "Settings",
    "TeacherSettings",
    "TrainSettings",
]

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """Frozen, validated, closed: unknown keys are refused and the nearest known one is suggested."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def read(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate `values`; `where` is the YAML path or the command that they came from.

        Raises SettingsError naming the first wrong key as `where.key`.
        """
        for key in values:
            if key not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                raise SettingsError(
                    f"one of the keys of {where}", f"'{key}'{nearest(str(key), cls.model_fields)}", f"known: {known}"
                )
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in (where, *first["loc"]))
            text = first["msg"].removeprefix("Value error, ")
            given = first["input"]
            got = "" if isinstance(given, Mapping | BaseModel) else f", got {given!r}"
            raise SettingsError(f"{place}: {text[0].lower()}{text[1:]}{got}") from None


class TrainSettings(Settings):
    """What every gradient method shares (see `flyweight.training`)."""

    epochs: float = Field(3.0, ge=0)
    """Passes over the training data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(32, ge=1)
    """Examples per optimizer step."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; biases and norms are exempt."""
    warmup: Share = 0.1
    """Share of the steps over which the learning rate rises linearly from 0."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    evaluations_per_epoch: int = Field(1, ge=1)
    """How often the validation metric is taken; the best checkpoint is kept."""
    patience: int | None = Field(None, ge=1)
    """Stop early after this many evaluations without a better one."""


class FinetuneSettings(TrainSettings):
    """Train all weights on the labelled data."""


class TeacherSettings(TrainSettings):
    """What learning from a teacher's answers takes (Hinton et al. 2015)."""

    teacher: str = "reference"
    """`reference` (the model after `finetune`), or a model folder or artifact with the same vocabulary and labels."""
    temperature: float = Field(2.0, gt=0)
    """T: softens both distributions."""
    alpha: Share = 0.7
    """Weight of the teacher's answer against the label; 1 needs no labels."""
    hidden_weight: float = Field(0.0, ge=0)
    """Weight of the hidden-state loss (TinyBERT, Jiao et al. 2020, section 3.1); 0 leaves it out."""
    unlabelled: Path | None = None
    """A file of further texts without labels; they take part in the teacher's half of the loss."""

    @property
    def taught(self) -> bool:
        """Whether the step learns from a teacher at all."""
        return True


class DistillSettings(TeacherSettings):
    """Train a student to answer as its teacher does (Hinton et al. 2015).

    Loss: (1-alpha) * CE(y, student) + alpha * T^2 * KL(softmax(teacher/T) || softmax(student/T)), batch mean,
    + hidden_weight * MSE(projected student hidden states, teacher hidden states).
    """

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    student: str | None = None
    """A model folder to start from; by default the student is made from the model at hand by `layers`."""
    layers: Literal["all", "every-other"] | tuple[int, ...] = "all"
    """Layers that the student keeps: `all`, `every-other`, or a list of numbers from 0."""
    layer_map: tuple[int, ...] | None = None
    """For each student layer the teacher layer it imitates; by default spread evenly."""
    control: bool = False
    """Train the same student for the same steps without the teacher as well, and report both."""


class PruneSettings(TrainSettings):
    """Remove weights, heads, neurons or layers.

    The training settings matter with `gradual: cubic`, where the model trains while it shrinks.
    """

    target: Literal["weights", "heads", "neurons", "layers"] = "weights"
    """What is removed. Heads, neurons and layers go physically; weights are stored as bitmask + values."""
    amount: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share to remove."""
    threshold: float | None = Field(None, gt=0)
    """`target: weights` only: remove what is smaller in magnitude than this."""
    criterion: Literal["magnitude", "random", "taylor"] = "magnitude"
    """`magnitude` = L1 norm; `taylor` = |gradient x weight| on the user's data (Michel et al. 2019; Molchanov et al. 2017)."""
    scope: Literal["layer", "global"] = "layer"
    """Compare scores within each layer (all layers end alike) or over all layers."""
    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """`2:4` keeps the two largest of every four weights along the input."""
    gradual: Literal["one-shot", "cubic"] = "one-shot"
    """`cubic`: the share grows as s(t) = amount * (1 - (1 - t)^3) in training (Zhu and Gupta 2017, eq. 1)."""
    samples: int = Field(512, ge=1)
    """Training examples that Taylor scores are taken on."""
    multiple_of: int = Field(1, ge=1)
    """Neurons kept per layer are rounded up to a multiple of this; kernels like 8 or 16."""
    skip: tuple[str, ...] = ()
    """Name patterns (`*.layer.0.*`) of weights to leave whole; `target: weights` only."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.target != "weights":
            if self.amount is None:
                raise ValueError(f"target {self.target} needs an amount between 0 and 1")
            for name in ("threshold", "skip"):
                if getattr(self, name):
                    raise ValueError(f"{name} goes with target weights only")
            if self.pattern != "unstructured":
                raise ValueError("pattern 2:4 goes with target weights only")
        elif self.pattern == "2:4":
            if self.threshold is not None or self.amount not in (None, 0.5):
                raise ValueError("pattern 2:4 removes exactly half: leave out amount and threshold")
        elif (self.amount is None) == (self.threshold is None):
            raise ValueError("target weights needs either an amount or a threshold")
        if self.target == "weights" and self.criterion == "taylor":
            raise ValueError("criterion taylor goes with heads, neurons and layers")
        if self.gradual == "cubic" and (self.target == "layers" or self.amount is None):
            raise ValueError("gradual cubic needs an amount and target weights, heads or neurons")
        return self


class QuantizeSettings(TeacherSettings):
    """Store weights in k bits, and let integer kernels run.

    The settings of training and teacher matter with `method: train`.
    """

    bits: int = Field(8, ge=1, le=8)
    """Bits a weight."""
    scheme: Literal["symmetric", "asymmetric", "ternary", "binary"] = "symmetric"
    """`symmetric`: no zero-point; `asymmetric`: with one; `ternary`: -s, 0, s in 2 bits (Li et al. 2016); `binary`:
    sign x mean(|W|) (Rastegari et al. 2016, eq. 6)."""
    method: Literal["nearest", "gptq", "awq", "hqq", "reconstruct", "train"] = "nearest"
    """How weights find their grid points: `nearest` rounds; `gptq` corrects later weights for earlier errors (Frantar et al.
    2022); `awq` scales the channels that matter (Lin et al. 2024); `hqq` fits zero-points without data (Badri and Shaji
    2023); `reconstruct` learns the rounding block by block (Nagel et al. 2020; Cheng et al. 2023); `train` trains the model
    with rounded weights (Esser et al. 2020)."""
    granularity: Literal["tensor", "channel", "group"] = "channel"
    """What shares one scale: the tensor, an output channel, or `group_size` inputs of one channel."""
    group_size: int = Field(64, ge=2)
    """Weights a group; it must divide the number of inputs."""
    activations: Literal["none", "dynamic", "token", "static"] = "dynamic"
    """Inputs of quantized linears become int8 and integer kernels run: `dynamic` with one scale a batch, found at run time;
    `token` with one scale a token; `static` on a fixed grid found by calibration. `none`: weights only."""
    ranges: Literal["best", "minmax", "percentile", "mse", "entropy"] = "best"
    """How static grids are cut off; `best` tries all and keeps, for every input, what harms the layer's output least."""
    smooth: bool = True
    """Static: move the size of outlying input channels into the weights, as far as it helps (Xiao et al. 2023)."""
    outliers: int = Field(32, ge=0)
    """Static: at most so many input channels of a linear stay in float, where that helps (Dettmers et al. 2022)."""
    reduce_range: Literal["auto", "on", "off"] = "auto"
    """Linears of 8 bits with integer inputs take 7: on a CPU without VNNI sums of two products saturate at 16 bits otherwise, or
    the exact kernel is a slower one. `auto`: where the CPU at hand is such a one; `on`: for an artifact that is meant for one."""
    bias_correction: bool = False
    """Add the mean error of a linear's output to its bias (Nagel et al. 2019, section 4.2)."""
    samples: int = Field(256, ge=1)
    """Texts to calibrate on."""
    bits_per_weight: float | None = Field(None, gt=1, le=8)
    """Choose the bits of every layer, 2, 3, 4 or 8, so that their mean (scales included) is at most this at the least error."""
    max_megabytes: float | None = Field(None, gt=0)
    """The same, so that all weights take at most so many megabytes (10^6 bytes), with tables, scales and what stays in float."""
    learning_rate: float = Field(3e-4, gt=0)
    """`train`: peak learning rate of AdamW; log-scales take ten times as much."""
    hidden_weight: float = Field(1.0, ge=0)
    """`train`: weight of the hidden-state loss (Jiao et al. 2020, section 3.1); 0 leaves it out and spares the teacher's pass."""
    step_down: tuple[Annotated[int, Field(ge=1, le=8)], ...] = ()
    """`train`: bits to train at in turn, such as 8, 4, 2, 1, ending at `bits`, for shares of the steps as 1 / bits; the model
    of the stage before is a second teacher (Martinez et al. 2020, section 3.2)."""
    damping: float = Field(0.01, gt=0)
    """`gptq`: share of the mean diagonal that is added to the Hessian."""
    iterations: int = Field(200, ge=1)
    """`reconstruct`: steps of sign gradient descent a block."""
    gate: Literal["auto", "required", "off"] = "auto"
    """With an acceptance rule (`--max-drop`, `--quality`), the layers that harm most fall back to more bits or float until
    the rule holds on the validation examples. `auto` goes on with a warning where even float misses it; `required` stops."""
    embeddings: int | None = Field(8, ge=1, le=8)
    """Bits of embedding tables, per row (half of a small encoder); none leaves them in float."""
    skip: tuple[str, ...] = ()
    """Name patterns (`classifier*`) of modules to leave in float."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.scheme == "binary" and self.bits != 1:
            raise ValueError("scheme binary has exactly 1 bit: set bits to 1")
        if self.scheme == "ternary" and self.bits != 2:
            raise ValueError("scheme ternary takes 2 bits: set bits to 2")
        if self.scheme == "symmetric" and self.bits == 1:
            raise ValueError("a symmetric grid of 1 bit has a single point: use scheme binary or asymmetric")
        if self.activations != "none" and self.granularity == "group":
            raise ValueError("groups have no integer kernel: set activations to none")
        if self.method == "train" and self.bias_correction:
            raise ValueError("bias_correction goes with weights that were not trained: method train learns its biases")
        if self.method == "hqq" and self.scheme != "asymmetric":
            raise ValueError("method hqq fits zero-points: set scheme to asymmetric")
        if self.method not in ("nearest", "train") and self.scheme in ("ternary", "binary"):
            raise ValueError(f"method {self.method} has no {self.scheme} grid: use nearest or train")
        if self.method == "train" and self.granularity == "group":
            raise ValueError("method train learns a scale per channel or tensor: set granularity to channel")
        if self.step_down and self.method != "train":
            raise ValueError("step_down goes with method train")
        falling = tuple(sorted(set(self.step_down), reverse=True))
        if self.step_down and (self.step_down != falling or falling[-1] != self.bits):
            raise ValueError(f"step_down falls from bits to fewer bits and ends at bits, which is {self.bits}")
        if self.bits_per_weight is not None and self.max_megabytes is not None:
            raise ValueError("bits_per_weight and max_megabytes are two budgets: give one")
        budget = "max_megabytes" if self.bits_per_weight is None else "bits_per_weight"
        if self.mixed and (self.method == "train" or self.scheme in ("ternary", "binary")):
            raise ValueError(f"{budget} mixes symmetric or asymmetric grids without training")
        if self.mixed and "bits" in self.model_fields_set:
            raise ValueError(f"{budget} chooses the bits of every layer: leave out bits")
        return self

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without `bits` under a budget, which chooses them: what is written can be read again."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name != "bits" or not self.mixed}

    @property
    def taught(self) -> bool:
        return self.method == "train"

    @property
    def mixed(self) -> bool:
        """Whether every layer gets bits of its own, under a budget."""
        return self.bits_per_weight is not None or self.max_megabytes is not None

    @property
    def calibrated(self) -> bool:
        """Whether the step looks at texts without training on them."""
        return (
            self.activations == "static"
            or self.mixed
            or self.method in ("gptq", "awq", "reconstruct")
            or self.bias_correction
        )


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
