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

    @property
    def teachers(self) -> tuple[str, ...]:
        """All that are named, `teacher` first."""
        return (self.teacher,)


class DistillSettings(TeacherSettings):
    """Train a student to answer as its teacher does (Hinton et al. 2015).

    Loss: (1-alpha) * CE(y, student) + alpha * (T^2 * KL(softmax(teacher/T) || softmax(student/T)) + dist_weight * DIST
    + mse_weight * MSE of logits), batch mean, + hidden_weight * MSE(projected student hidden states, teacher hidden states)
    + embedding_weight * the same of embeddings + attention_weight * MSE of scores + relation_weight * KL of relations.
    """

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    student: str | None = None
    """A model folder to start from, or one with a config.json alone for a student of random weights; by default the student is
    made from the model at hand by `layers` and `width`."""
    layers: Literal["all", "every-other"] | tuple[int, ...] = "all"
    """Layers that the student keeps: `all`, `every-other`, or a list of numbers from 0."""
    width: int | None = Field(None, ge=1)
    """Hidden width of the student, a multiple of its number of heads: cut by truncated SVD of hidden states on the texts."""
    more_teachers: tuple[str, ...] = ()
    """Further teachers, as `teacher`; their answers count as well, hidden states are those of `teacher`."""
    teacher_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Weights of the answers of `teacher` and `more_teachers`, in this order; by default all alike."""
    kl: Literal["forward", "reverse", "skew", "none"] = "forward"
    """How answers are compared: KL(teacher || student), KL(student || teacher), or KL(teacher || .1 teacher + .9 student) (Ko et
    al. 2024)."""
    dist_weight: float = Field(0.0, ge=0)
    """Weight of DIST: correlation of rows and columns of the answers (Huang et al. 2022)."""
    mse_weight: float = Field(0.0, ge=0)
    """Weight of the mean squared difference of logits."""
    embedding_weight: float = Field(0.0, ge=0)
    """Weight of the loss of what the first block reads (Jiao et al. 2020, eq. 9)."""
    attention_weight: float = Field(0.0, ge=0)
    """Weight of the loss of attention scores (Jiao et al. 2020, eq. 7); the student has the teacher's heads, or some of them."""
    relation_weight: float = Field(0.0, ge=0)
    """Weight of the relations among queries, keys and values of the last student layer (Wang et al. 2021)."""
    relation_heads: int = Field(32, ge=1)
    """Slices that relations are taken in; they divide both widths, and have nothing to do with the models' heads."""
    layer_map: Literal["uniform", "last"] | tuple[int, ...] = "uniform"
    """The teacher layers that the student's imitate: `uniform`, spread evenly; `last`, the last ones; or one number each."""
    top_k: int | None = Field(None, ge=1)
    """Keep of the teacher's answers only so many classes, and the mass of the others as one more."""
    augment: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of tokens that are masked or replaced at random, anew in every epoch, before the teacher is asked; 0: texts as they
    are. The teacher then answers in every step."""
    control: bool = False
    """Train the same student for the same steps without the teacher as well, and report both."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        inside = self.hidden_weight + self.embedding_weight + self.attention_weight + self.relation_weight
        answers = self.kl != "none" or self.dist_weight + self.mse_weight > 0
        if self.alpha == 1 and not answers and inside == 0:
            raise ValueError("kl none and alpha 1 leave nothing to learn: give another loss a weight")
        if self.augment and inside == 0 and not (self.alpha > 0 and answers):
            raise ValueError("augment is for the teacher's half of the loss: give it a weight, such as alpha")
        if self.top_k is not None and self.augment:
            raise ValueError("top_k is for answers that are kept; with augment the teacher answers anew: leave out one")
        if self.top_k is not None and self.dist_weight + self.mse_weight > 0:
            raise ValueError("dist_weight and mse_weight need the answers for all classes: leave out top_k")
        if self.teacher_weights and len(self.teacher_weights) != len(self.teachers):
            raise ValueError(f"teacher_weights names one weight a teacher, {len(self.teachers)} in all")
        return self

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.teacher, *self.more_teachers)


class PruneSettings(TeacherSettings):
    """Remove weights, heads, neurons, layers or tokens.

    The settings of training matter with `gradual`, where the model trains while it shrinks; those of the teacher with
    `gradual: l0`.
    """

    target: Literal["weights", "heads", "neurons", "heads+neurons", "layers", "vocabulary"] = "weights"
    """What is removed. Heads, neurons, layers and tokens go physically; weights are stored as bitmask + values."""
    amount: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share to remove. Vocabulary: by default all tokens that the corpus does not use."""
    threshold: float | None = Field(None, gt=0)
    """`target: weights` only: remove what is smaller in magnitude than this."""
    speedup: float | None = Field(None, gt=1)
    """Heads and neurons: instead of `amount` how many times less the result shall take; what every block keeps is chosen under
    that budget by a table of costs (Kurtic et al. 2023, section 3)."""
    cost: Literal["latency", "flops", "bytes"] = "latency"
    """What `speedup` counts. `latency`: measured on `engine` on this machine, and met by the exported model."""
    engine: Literal["onnxruntime", "openvino"] = "onnxruntime"
    """`cost: latency`: the engine that the model is meant for."""
    precision: Literal["fp32", "int8"] = "fp32"
    """`cost: latency`: what the model will run in; int8 where it is quantized afterwards."""
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 128)
    """`cost: latency` and `flops`: batch and tokens that are counted at."""
    criterion: Literal["magnitude", "random", "taylor", "fisher", "hessian", "wanda", "cosine", "loss"] = "magnitude"
    """What goes first. `magnitude`: L1 norm; `taylor`: |gradient x weight| on the user's data (Michel et al. 2019; Molchanov et
    al. 2017); `fisher`: squared gradients of masks (Kwon et al. 2022; the default with `speedup`); `hessian`: least change of a
    linear's output, the rest made up for it (Frantar and Alistarh 2022, 2023); `wanda`: |weight| x size of its input (Sun et
    al. 2024); layers also `cosine`: 1 - cosine of input and output (Men et al. 2024), and `loss`: the task's loss without it."""
    rearrange: bool = True
    """`criterion: fisher`: swap units of a block as long as their joint Fisher information falls (Kwon et al. 2022, sec. 5.2)."""
    restore: Literal["none", "masks", "linear", "block"] = "none"
    """What makes up for heads and neurons that went, without training. `masks` scales those that stay (Kwon et al. 2022, sec.
    5.3); `linear` solves the weights that read them (Park et al. 2024; the default with `speedup`); `block` then
    trains every block by itself to answer as the dense one."""
    scope: Literal["layer", "global"] = "layer"
    """Compare scores within each layer (all layers end alike) or over all layers."""
    pattern: str = Field("unstructured", pattern=r"^(unstructured|[1-9]\d?:[1-9]\d?)$")
    """`2:4` keeps the two largest of every four weights along the input; any N:M."""
    gradual: Literal["one-shot", "cubic", "l0"] = "one-shot"
    """`cubic`: the share grows as s(t) = amount * (1 - (1 - t)^3) in training (Zhu and Gupta 2017, eq. 1); `l0`: training finds
    what goes, layers, heads and neurons together, and learns from the teacher (CoFi, Xia et al. 2022)."""
    samples: int = Field(512, ge=1)
    """Training examples that scores and restoring are taken on."""
    multiple_of: int = Field(1, ge=1)
    """Neurons kept per layer are rounded up to a multiple of this; kernels like 8 or 16."""
    damping: float = Field(0.01, gt=0)
    """`hessian` and `restore`: share of the mean diagonal that is added to the Hessian. `restore` also tries more."""
    corpus: Path | None = None
    """`target: vocabulary`: texts whose tokens stay; by default the training and calibration texts."""
    skip: tuple[str, ...] = ()
    """Name patterns (`*.layer.0.*`) of weights to leave whole; `target: weights` only."""

    @model_validator(mode="before")
    @classmethod
    def _by_wish(cls, given: Any) -> Any:
        """A wish chooses by Fisher information and makes up for what went, unless told otherwise."""
        if isinstance(given, Mapping) and given.get("speedup") is not None and given.get("gradual") != "l0":
            return {"criterion": "fisher", "restore": "linear", **given}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        structured = self.target in ("heads", "neurons", "heads+neurons")
        if self.speedup is not None and not structured:
            raise ValueError("speedup goes with target heads, neurons or heads+neurons")
        if self.speedup is not None and self.amount is not None:
            raise ValueError("amount and speedup are two wishes: give one")
        if self.target == "weights":
            self._consistent_weights()
        else:
            self._consistent_parts(structured)
        if self.gradual == "cubic" and (self.target in ("layers", "vocabulary") or self.amount is None):
            raise ValueError("gradual cubic needs an amount and target weights, heads or neurons")
        if self.gradual == "cubic" and self.criterion not in ("magnitude", "random", "taylor"):
            raise ValueError("gradual cubic scores again and again: set criterion to magnitude, random or taylor")
        if self.gradual == "l0" and (self.target != "heads+neurons" or self.criterion != "magnitude"):
            raise ValueError(
                "gradual l0 goes with target heads+neurons, layers go with them, and finds by itself what goes"
            )
        if self.gradual != "one-shot" and self.restore != "none":
            raise ValueError(f"gradual {self.gradual} trains what is left: set restore to none")
        return self

    def _consistent_weights(self) -> None:
        if self.criterion not in ("magnitude", "random", "hessian", "wanda"):
            raise ValueError(f"criterion {self.criterion} goes with heads, neurons and layers")
        if self.restore != "none":
            raise ValueError("restore goes with heads and neurons; criterion hessian makes up for weights that went")
        if self.pattern != "unstructured":
            kept, of = map(int, self.pattern.split(":"))
            if kept >= of:
                raise ValueError("pattern N:M keeps N of M, fewer than M")
            if self.threshold is not None or self.amount not in (None, 1 - kept / of):
                raise ValueError(
                    f"pattern {self.pattern} removes exactly {1 - kept / of:g}: leave out amount and threshold"
                )
        elif (self.amount is None) == (self.threshold is None):
            raise ValueError("target weights needs either an amount or a threshold")
        if self.threshold is not None and self.criterion != "magnitude":
            raise ValueError("threshold is one of magnitude: give an amount")
        if self.scope == "global" and self.criterion in ("hessian", "wanda"):
            raise ValueError(f"criterion {self.criterion} weighs weights within their layer: set scope to layer")

    def _consistent_parts(self, structured: bool) -> None:
        if self.amount is None and self.speedup is None and self.target != "vocabulary":
            raise ValueError(
                f"target {self.target} needs an amount between 0 and 1{' or a speedup' if structured else ''}"
            )
        for name in ("threshold", "skip"):
            if getattr(self, name):
                raise ValueError(f"{name} goes with target weights only")
        if self.pattern != "unstructured":
            raise ValueError(f"pattern {self.pattern} goes with target weights only")
        if self.corpus is not None and self.target != "vocabulary":
            raise ValueError("corpus goes with target vocabulary only")
        if not structured and self.restore != "none":
            raise ValueError("restore goes with heads and neurons")
        fits = {
            "layers": ("magnitude", "random", "taylor", "cosine", "loss"),
            "vocabulary": ("magnitude",),  # how often a token is used decides
        }.get(self.target, ("magnitude", "random", "taylor", "fisher", "hessian"))
        if self.criterion not in fits:
            raise ValueError(f"criterion {self.criterion} is none for {self.target}: {', '.join(fits)}")

    @property
    def taught(self) -> bool:
        return self.gradual == "l0"

    @property
    def calibrated(self) -> bool:
        """Whether the step looks at texts without training on them; it takes them with labels where there are any."""
        return self.criterion in ("fisher", "hessian", "wanda", "cosine", "loss") or self.restore != "none"


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
