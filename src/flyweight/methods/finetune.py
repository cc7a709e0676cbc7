"""Train all weights on the labelled data."""

from __future__ import annotations

from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.models.bundle import Bundle
from flyweight.settings import FinetuneSettings
from flyweight.training import TaskObjective, keep_zeros, train, validation

__all__ = ["finetune"]


def finetune(bundle: Bundle, settings: FinetuneSettings, context: Context) -> Bundle:
    """Fine-tune the bundle's model in place on `context.train`; its best weights on `context.validation` are kept.

    Weights pruned to zero stay zero. The curve goes into `context.notes`. Raises StepError when the weights are
    quantized or there are no labels, and what `flyweight.training.train` raises.
    """
    if bundle.quantized:
        raise StepError(
            "float weights to fine-tune",
            f"{len(bundle.quantized)} quantized ones",
            "fine-tune before quantizing: training packed weights needs quantization-aware training",
        )
    if not context.task.labelled:
        raise StepError("a task with labels to fine-tune on", f"'{context.task.name}'", "use the step distill")
    if context.train is None or context.train.labels is None:
        raise StepError("labelled examples to fine-tune on", "none", "give them with --train")
    with keep_zeros(bundle.model, bundle.sparse):
        result = train(
            bundle.model,
            TaskObjective(bundle, settings),
            context.train,
            settings,
            seed=context.seed,
            pad=bundle.encoder.pad,
            work=context.work,
            evaluate=validation(bundle, context.validation),
            progress=context.progress,
            device=context.device,
            what="fine-tuning",
            key="" if context.validation is None else context.validation.content_hash(),
        )
    context.notes.update(result.notes())
    bundle.fresh_head = False
    return bundle
