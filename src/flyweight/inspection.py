"""What a model is made of, and what could be taken away or packed."""

from __future__ import annotations

from typing import Any

from flyweight.artifact import is_artifact, read_manifest
from flyweight.job import guess_task
from flyweight.measure.size import part_parameters
from flyweight.measure.static import static_figures
from flyweight.models.bundle import Bundle
from flyweight.models.load import load, resolve
from flyweight.models.surgery import linears, shapes, weight_2d
from flyweight.settings import DataSettings
from flyweight.tasks import task_named

__all__ = ["inspect", "open_bundle"]


def open_bundle(source: str, data: DataSettings | None = None, revision: str | None = None) -> Bundle:
    """A model folder, artifact or hub id for the task of its own head. Raises ModelError, ArtifactError."""
    data = data or DataSettings()
    folder = resolve(source, revision)
    return load(str(folder), task_named(guess_task(folder)), max_length=data.max_length, truncate=data.truncate)


def kernels(model: str, revision: str | None = None) -> dict[str, Any]:
    """What the engines ran of an artifact, by its own manifest; empty for any other model."""
    folder = resolve(model, revision)
    found = read_manifest(folder).kernels if is_artifact(folder) else {}
    return {name: report.model_dump() for name, report in found.items()}


def inspect(model: str, revision: str | None = None, length: int = 128) -> dict[str, Any]:
    """JSON: family, task, labels, blocks with heads and neurons, parameters and bytes by part, flops, what can be
    pruned and quantized and what that would save at most.

    Raises ModelError, ArtifactError.
    """
    bundle = open_bundle(model, revision=revision)
    parts = part_parameters(bundle)
    total = sum(parts.values())
    shaped = shapes(bundle.model, bundle.family)
    inside = sum(weight_2d(module).numel() for module in linears(bundle.model, bundle.family).values())
    tables = parts.get("embeddings", 0)
    layers = sum(map(len, shaped.values()))
    mb = "{:.1f} MB now, {:.1f} MB in 8 bits, {:.1f} MB in 1 bit".format
    return {
        "model": str(model),
        "artifact": is_artifact(resolve(model, revision)),
        "family": bundle.family.model_type,
        "task": bundle.task,
        "labels": bundle.labels,
        "max_length": bundle.encoder.max_length,
        "vocabulary": bundle.encoder.tokenizer.get_vocab_size(),
        "blocks": {
            name: [{"heads": [len(heads) for heads in block.heads], "neurons": block.neurons} for block in stack]
            for name, stack in shaped.items()
        },
        "parameters": parts,
        "figures": {key: figure.model_dump() for key, figure in static_figures(bundle, length).items()},
        "quantized": {name: codes.info.bits for name, codes in bundle.quantized.items()},
        "kernels": kernels(model, revision),
        "possible": {
            "prune heads and neurons": f"{inside / total:.0%} of the weights stand in attention and MLP",
            "prune layers": f"{layers} layers, {inside / max(1, layers) / total:.1%} of the weights each",
            "quantize linears": mb(4 * inside / 1e6, inside / 1e6, inside / 8e6),
            "quantize embeddings": mb(4 * tables / 1e6, tables / 1e6, tables / 8e6),
        },
    }
