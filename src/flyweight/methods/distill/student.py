"""Which model learns, and which layers it keeps."""

from __future__ import annotations

from collections.abc import Sequence

from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.models.bundle import Bundle
from flyweight.models.surgery import blocks, keep_layers_of
from flyweight.settings import DistillSettings

__all__ = ["kept_layers", "make_student"]


def make_student(bundle: Bundle, settings: DistillSettings, context: Context, teacher: Bundle) -> Bundle:
    """The model that learns: `student`'s folder or the model at hand, with the layers that `layers` keeps.

    The teacher is left whole. Raises StepError for layers that do not exist.
    """
    student = bundle if settings.student is None else context.load(settings.student)
    if student.quantized:
        raise StepError(
            "a student with float weights",
            f"{len(student.quantized)} quantized ones",
            "distil before quantizing: training packed weights needs quantization-aware training",
        )
    keep = {
        stack: kept_layers(settings.layers, len(layers))
        for stack, layers in blocks(student.model, student.family).items()
    }
    if student.model is teacher.model:
        student = student.copy()
    if settings.layers != "all":
        keep_layers_of(student, keep)
    return student


def kept_layers(layers: str | Sequence[int], depth: int) -> list[int]:
    """Numbers of the layers to keep of `depth`. Raises StepError for one that does not exist or stands out of order."""
    if layers == "all":
        return list(range(depth))
    if layers == "every-other":
        return list(range(0, depth, 2))
    found = [int(number) for number in layers]
    wrong = [number for number in found if not 0 <= number < depth]
    if wrong or not found:
        got = f"layer {wrong[0]}" if wrong else "an empty list"
        raise StepError(f"layers from 0 to {depth - 1}", got, "mend `layers`")
    if found != sorted(set(found)):
        raise StepError("layers in rising order, each once", f"{found}", "mend `layers`")
    return found
