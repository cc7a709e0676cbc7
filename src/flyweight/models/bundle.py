"""A model in hand: what every step takes and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

from flyweight.artifact import QuantizedTensor, StepRecord
from flyweight.models.family import Family
from flyweight.tokenization import Encoder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["OPTIONAL", "Bundle", "Codes"]

OPTIONAL = ("zero_point", "smooth", "outliers", "outlier_values", "input_scale", "input_zero_point", "input_shift")
"""Parts of Codes, all tensors, that may be None and are stored as they are."""


@dataclass(frozen=True)
class Codes:
    """One weight as integers; `flyweight.models.codes` turns them back.

    weight ~ integers * scale / smooth, but the columns named by `outliers` are `outlier_values`. A linear computes
    (((x - input_shift) / smooth), rounded to the input's grid, 0 at outliers) @ (integers * scale)^T
    + input_shift @ weight^T + x[outliers] @ outlier_values^T

    info:       shape, bits and layout
    codes:      [out, in] uint8, 0 .. 2^bits - 1 (symmetric grids: the integer + 2^(bits-1); binary: 0 = -1, 1 = +1)
    scale:      [1], [out, 1] or [out, groups] float32
    zero_point: as `scale`, uint8, or None for symmetric and binary grids
    mask:       [out, in] bool, False where pruned, or None; pruned weights are exactly zero (a binary grid has no zero)
    smooth:     [in] float32 above 0, or None (SmoothQuant, Xiao et al. 2023, eq. 3; AWQ, Lin et al. 2024, eq. 4)
    outliers:   [n] int64 ascending, input channels that stay in float (LLM.int8, Dettmers et al. 2022), or None
    outlier_values: [out, n] float32, their weights; the codes there mean zero
    input_scale, input_zero_point: [1] float32 and [1] uint8, the fixed grid of (x - input_shift) / smooth; None where it is
                taken at run time or the input stays in float
    input_shift: [in] float32, 0 at outliers, or None: what is taken off every channel before a fixed grid
    """

    info: QuantizedTensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    mask: Tensor | None = None
    smooth: Tensor | None = None
    outliers: Tensor | None = None
    outlier_values: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None
    input_shift: Tensor | None = None

    @cached_property
    def of_shift(self) -> Tensor | None:
        """[out] float32: input_shift @ weight^T."""
        from flyweight.models.codes import dequantize

        if self.input_shift is None:
            return None
        return (dequantize(self).double() @ self.input_shift.double()).float()

    @cached_property
    def zero_rows(self) -> Tensor:
        """[out] bool: all of whose codes mean zero."""
        from flyweight.models.codes import integers

        return (integers(self) == 0).all(1)


@dataclass
class Bundle:
    """model + tokenizer + family + task. Steps may change `model` in place: a caller who needs the old one copies it first.

    labels:      names of the classes in the order of the outputs, or None
    quantized:   {parameter name: Codes}; the parameter itself then holds the dequantized values
    activations: what becomes of the inputs of quantized linears. "none": they stay in float; "dynamic": int8, one scale a
                 batch; "token": int8, one scale a token; "static": int8 on the fixed grid in the linear's Codes
                 (float where it has none)
    sparse:      {parameter name: pattern} of weights pruned to zero; their zeros stay zero in training
    fresh_head:  the head was made by `load` and knows nothing yet; `finetune` clears it
    origin:      sha256 of the model folder that everything began with
    steps:       what was done so far
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    family: Family
    task: str
    encoder: Encoder
    labels: tuple[str, ...] | None = None
    quantized: dict[str, Codes] = field(default_factory=dict)
    activations: Literal["none", "dynamic", "token", "static"] = "none"
    sparse: dict[str, str] = field(default_factory=dict)
    fresh_head: bool = False
    origin: str = ""
    steps: tuple[StepRecord, ...] = ()

    def copy(self) -> Self:
        """A deep copy of model and state; tokenizer and family are shared."""
        from copy import deepcopy

        return replace(self, model=deepcopy(self.model), quantized=dict(self.quantized), sparse=dict(self.sparse))

    @property
    def device(self) -> Any:
        return next(self.model.parameters()).device
