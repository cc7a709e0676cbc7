"""Removing weights, heads, neurons, layers and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from flyweight.settings.training import TeacherSettings

__all__ = ["PruneSettings"]


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
    """Heads and neurons: instead of `amount` how many times less the result shall take than the reference (the model after
    `finetune`, else the one given): what earlier steps of the recipe gained is part of it. What every block keeps is chosen under
    that budget by a table of costs (Kurtic et al. 2023, section 3)."""
    cost: Literal["latency", "flops", "bytes"] = "latency"
    """What `speedup` counts. `latency`: measured on `engine` on this machine with the threads of `measure`, and met by the
    exported model."""
    engine: Literal["onnxruntime", "openvino"] = "onnxruntime"
    """`cost: latency`: the engine that the model is meant for."""
    precision: Literal["fp32", "int8"] = "fp32"
    """`cost: latency`: what the model will run in; int8 where it is quantized afterwards. The reference is timed in the same, so
    what int8 itself gains comes on top."""
    shape: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 128)
    """`cost: latency` and `flops`: batch and tokens that are counted at."""
    table: Path | None = None
    """`cost: latency`: an artifact of an earlier run with `speedup`, whose table of what blocks cost is taken, or a file of the
    cache's folder `tables`. It has to be of this machine, engine and shape. By default the cache has it, or it is measured."""
    criterion: Literal["magnitude", "random", "taylor", "fisher", "hessian", "wanda", "cosine", "loss"] = "magnitude"
    """What goes first. `magnitude`: L1 norm; `taylor`: |gradient x weight| on the user's data (Michel et al. 2019; Molchanov et
    al. 2017); `fisher`: squared gradients of masks (Kwon et al. 2022; the default with `speedup`); `hessian`: least change of a
    linear's output, the rest made up for it (Frantar and Alistarh 2022, 2023); `wanda`: |weight| x size of its input (Sun et
    al. 2024); layers also `cosine`: 1 - cosine of input and output (Men et al. 2024), and `loss`: the task's loss without it."""
    rearrange: bool = True
    """`criterion: fisher`: swap units of a block as long as their joint Fisher information falls (Kwon et al. 2022, sec. 5.2)."""
    restore: Literal["none", "masks", "linear", "block"] = "none"
    """What makes up for what went, without labels. Heads and neurons: `masks` scales those that stay (Kwon et al. 2022, sec.
    5.3); `linear` solves the weights that read them (Park et al. 2024; the default with `speedup`); `block` then trains every
    block by itself to answer as the dense one. Weights and layers: `block` alone."""
    scope: Literal["layer", "global"] = "layer"
    """Compare scores within each layer (all layers end alike) or over all layers."""
    pattern: str = Field("unstructured", pattern=r"^(unstructured|[1-9]\d?:[1-9]\d?)$")
    """`2:4` keeps the two largest of every four weights along the input; any N:M."""
    gradual: Literal["one-shot", "cubic", "l0"] = "one-shot"
    """`cubic`: the share grows as s(t) = amount * (1 - (1 - t)^3) in training (Zhu and Gupta 2017, eq. 1); `l0`: training finds
    what goes, layers, heads and neurons together, and learns from the teacher (CoFi, Xia et al. 2022)."""
    whole_parts: bool | None = None
    """`speedup`: an attention or a feed-forward part may go altogether, its bias stays; by default with `gradual: l0` alone,
    where training makes up for it."""
    width: bool = False
    """`gradual: l0`: dimensions of the residual stream go as well, of encoders with labels; for the highest compression. A table
    of times has no narrower blocks: what they take is estimated."""
    samples: int = Field(512, ge=1)
    """Texts that scores and restoring are taken on: those to calibrate on, or training examples."""
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
        if self.table is not None and (self.speedup is None or self.cost != "latency"):
            raise ValueError("table goes with speedup and cost latency")
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
        if self.whole_parts is not None and self.speedup is None and self.gradual != "l0":
            raise ValueError("whole_parts goes with speedup or gradual l0: an amount leaves every part something")
        if self.width and self.gradual != "l0":
            raise ValueError("width goes with gradual l0; a student of fewer dimensions is made by distill")
        if self.gradual != "one-shot" and self.restore != "none":
            raise ValueError(f"gradual {self.gradual} trains what is left: set restore to none")
        return self

    def _consistent_weights(self) -> None:
        if self.criterion not in ("magnitude", "random", "hessian", "wanda"):
            raise ValueError(f"criterion {self.criterion} goes with heads, neurons and layers")
        if self.restore not in ("none", "block"):
            raise ValueError(
                f"restore {self.restore} goes with heads and neurons; criterion hessian makes up for weights that went"
            )
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
        if not structured and self.restore not in ("none", "block" if self.target == "layers" else "none"):
            raise ValueError(f"restore {self.restore} goes with heads and neurons")
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
    def removes_parts(self) -> bool:
        """Whether all heads or neurons of a block may go."""
        return self.gradual == "l0" if self.whole_parts is None else self.whole_parts

    @property
    def calibrated(self) -> bool:
        """Whether the step looks at texts without training on them; it takes them with labels where there are any."""
        return self.criterion in ("fisher", "hessian", "wanda", "cosine", "loss") or self.restore != "none"

    @property
    def timed(self) -> bool:
        """Whether the wish is one that an engine is timed for."""
        return self.speedup is not None and self.cost == "latency"
