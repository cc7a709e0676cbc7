"""Which model learns: one of its own, or the model at hand with fewer layers and hidden channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor

from flyweight.context import Context
from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.methods.distill.width import check_narrower, narrowed
from flyweight.models.build import open_config, quiet
from flyweight.models.bundle import Bundle
from flyweight.models.families import family_of
from flyweight.models.load import origin_hash
from flyweight.models.surgery import blocks, keep_layers_of
from flyweight.settings import DistillSettings
from flyweight.tasks import task_named
from flyweight.training.device import seeded

__all__ = ["from_scratch", "is_config", "kept_layers", "open_student", "shaped", "whole_student"]

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.index.json")


def whole_student(bundle: Bundle, settings: DistillSettings, context: Context, teacher: Bundle) -> Bundle:
    """The model that learns before it is cut: `student`'s folder or the model at hand; never the teacher's own object.

    Raises StepError for a student that cannot learn, for layers that do not exist, and for a width that cannot be had.
    """
    student = bundle
    if settings.student is not None:
        student = open_student(settings.student, bundle, context.load, context.seed)
    if student.quantized:
        raise StepError(
            "a student with float weights",
            f"{len(student.quantized)} quantized ones",
            "distil before quantizing: training packed weights needs quantization-aware training",
        )
    for layers in blocks(student.model, student.family).values():
        kept_layers(settings.layers, len(layers))
    if settings.width is not None:
        if not context.task.labelled:
            raise StepError(
                "a task with labels for width",
                f"'{context.task.name}'",
                "leave it out: vectors of another width cannot be compared with the teacher's",
            )
        check_narrower(student, settings.width)
    return student.copy() if student.model is teacher.model else student


def shaped(
    student: Bundle, settings: DistillSettings, context: Context, texts: Examples
) -> tuple[Bundle, Tensor | None]:
    """The student with the width and the layers that the settings keep, and the basis of its stream, or None if whole."""
    basis = None
    if settings.width is not None and settings.width < student.model.config.hidden_size:
        student, basis = narrowed(student, settings.width, texts, context, task_named(student.task).auto)
    if settings.layers != "all":
        found = blocks(student.model, student.family)
        keep_layers_of(student, {stack: kept_layers(settings.layers, len(layers)) for stack, layers in found.items()})
    return student, basis


def open_student(name: str, bundle: Bundle, load: Callable[[str], Bundle], seed: int) -> Bundle:
    """The student called `name`, which is a model to load, or a folder with a config and no weights."""
    return from_scratch(Path(name), bundle, seed) if is_config(name) else load(name)


def is_config(name: str) -> bool:
    """Whether this is a folder that says what to build and has no weights to fill it with."""
    folder = Path(name).expanduser()
    return (folder / "config.json").is_file() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS)


def from_scratch(folder: Path, bundle: Bundle, seed: int) -> Bundle:
    """A model of random weights, drawn under `seed`, by a folder's config.json; tokenizer, task and labels are the bundle's.

    Raises ModelError for a config that cannot be read, StepError where its vocabulary is too small or it cannot be built.
    """
    folder = folder.expanduser()
    config = open_config(folder)
    family = family_of(config)
    size = bundle.encoder.tokenizer.get_vocab_size(with_added_tokens=True)
    if config.vocab_size < size:
        raise StepError(
            f"a vocabulary of at least the model's {size} tokens in {folder / 'config.json'}",
            f"{config.vocab_size}",
            f"set vocab_size to {size}",
        )
    config.pad_token_id = bundle.encoder.pad
    if bundle.labels is not None:
        config.id2label = dict(enumerate(bundle.labels))
        config.label2id = {name: number for number, name in enumerate(bundle.labels)}
        config.num_labels = len(bundle.labels)
    try:
        with seeded(seed), quiet():
            auto = getattr(transformers, task_named(bundle.task).auto)
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, TypeError, AssertionError) as error:  # each architecture has checks of its own
        text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise StepError(f"a model that {folder / 'config.json'} can build", f"'{text}'", "mend it") from None
    positions = getattr(config, "max_position_embeddings", None)
    longest = bundle.encoder.max_length
    if positions is not None:
        longest = min(longest, positions - family.position_offset)
    return replace(
        bundle,
        model=model.eval(),
        family=family,
        encoder=bundle.encoder._replace(max_length=longest),
        quantized={},
        activations="none",
        sparse={},
        fresh_head=False,
        origin=origin_hash(folder),
    )


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
