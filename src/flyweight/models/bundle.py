"""A model in hand: what every step takes and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self

from flyweight.artifact import QuantizedTensor, StepRecord
from flyweight.models.family import Family
from flyweight.tokenization import Encoder

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Bundle", "Codes"]


@dataclass(frozen=True)
class Codes:
    """One weight as integers; `flyweight.models.codes` turns them back.

    info:       shape, bits and layout
    codes:      [out, in] uint8, 0 .. 2^bits - 1 (symmetric grids: the integer + 2^(bits-1); binary: 0 = -1, 1 = +1)
    scale:      [1], [out, 1] or [out, groups] float32
    zero_point: as `scale`, uint8, or None for symmetric and binary grids
    mask:       [out, in] bool, False where pruned, or None; pruned weights are exactly zero (a binary grid has no zero)
    """

    info: QuantizedTensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    mask: Tensor | None = None


@dataclass
class Bundle:
    """model + tokenizer + family + task. Steps may change `model` in place: a caller who needs the old one copies it first.

    labels:      names of the classes in the order of the outputs, or None
    quantized:   {parameter name: Codes}; the parameter itself then holds the dequantized values
    activations: "dynamic" where inputs of quantized linears become int8 at run time
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
    activations: Literal["none", "dynamic"] = "none"
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
