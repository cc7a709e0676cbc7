"""Weights in k bits."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from flyweight.settings.training import TeacherSettings

__all__ = ["QuantizeSettings"]


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
