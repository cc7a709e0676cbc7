"""Store weights in few bits and let integer kernels run.

Which weights: linears of the blocks get `bits`; linears outside them (pooler, classifier, the projection after ELECTRA's
embeddings) get 8 bits, per channel, as they are well below a percent of the bytes while every answer passes through them
undiluted; embedding tables get `embeddings` bits per row, in the step's scheme (a row is a channel: what is looked up is
one scale and k bits a number). Norms, biases and position biases stay in float. A weight tied to a table is that table.

A pruned weight stays exactly zero; where a grid has no zero (binary) the mask says so.

`grid.py` has the formulas of rounding; `METHODS` names what finds the grid points of the blocks' linears.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from flyweight.errors import StepError
from flyweight.methods.quantize.awq import awq
from flyweight.methods.quantize.biases import correct_biases
from flyweight.methods.quantize.gate import open_gate
from flyweight.methods.quantize.gptq import gptq
from flyweight.methods.quantize.hqq import hqq
from flyweight.methods.quantize.mixed import account, choose_bits
from flyweight.methods.quantize.reconstruct import reconstruct
from flyweight.methods.quantize.static import input_grids, smooth_and_round
from flyweight.methods.quantize.train import train_aware
from flyweight.methods.quantize.work import Work, stored_bits, targets_of

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.models.bundle import Bundle
    from flyweight.settings import QuantizeSettings

__all__ = ["quantize"]


def quantize(bundle: Bundle, settings: QuantizeSettings, context: Context) -> Bundle:
    """Quantize the model (in place) and keep the codes in `bundle.quantized`.

    Raises StepError, before anything is changed: a model already quantized, NaN or inf in a weight (layer named), a group
    that does not divide a layer's inputs, a `skip` pattern that fits no module, nothing to quantize, no texts to calibrate on.
    Raises StepError, when the model is changed, where the rule of `gate: required` cannot hold.
    """
    if bundle.quantized:
        raise StepError("a model in float", "one already quantized", "quantize once, starting from the float model")
    work = Work(bundle, settings, context, targets_of(bundle, settings))
    gate = open_gate(work)
    for part in ("table", "head"):
        for target in work.of(part):
            work.nearest(target)
    if settings.mixed:
        choose_bits(work)
    _round_blocks(work)
    if gate is not None:
        gate.hold()
    if settings.mixed:
        account(work)
    context.notes.update(_notes(work))
    return replace(bundle, quantized=work.codes, activations=settings.activations if work.codes else "none")


def _round_blocks(work: Work) -> None:
    method, static = work.settings.method, work.settings.activations == "static"
    if static and method in ("nearest", "gptq"):
        smooth_and_round(work)
    else:
        METHODS[method](work)
        if static and method != "train":  # there the grids are trained as well
            input_grids(work)
    if work.settings.bias_correction:
        work.keep_biases()
        correct_biases(work)


def round_to_nearest(work: Work) -> None:
    targets = work.of("block")
    for target in work.context.progress.track(targets, "quantizing", total=len(targets)):
        work.nearest(target)


METHODS: dict[str, Callable[[Work], None]] = {
    "nearest": round_to_nearest,
    "gptq": gptq,
    "awq": awq,
    "hqq": hqq,
    "reconstruct": reconstruct,
    "train": train_aware,
}
"""Each puts codes for all of `work.of("block")`."""


def _notes(work: Work) -> dict[str, object]:
    """What the record of this step says: counts, stored bits a weight (scales included), the layers that changed most.

    Bits a weight are those of what has codes: None where nothing has.
    """
    weights = sum(codes.codes.numel() for codes in work.codes.values())
    worst = sorted(work.errors.items(), key=lambda item: -item[1])[:5]
    return {
        "weights": weights,
        "tensors": len(work.codes),
        "bits_per_weight": round(stored_bits(work.codes) / weights, 4) if weights else None,
        "relative_error": {name: round(error, 6) for name, error in worst},
        **work.notes,
    }
