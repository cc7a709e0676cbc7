"""How much there is of a model: weights, and bytes on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flyweight.artifact import MANIFEST, Measurement, engine_entry, is_artifact, read_manifest
from flyweight.errors import ArtifactError
from flyweight.models.bundle import OPTIONAL
from flyweight.tokenization import TOKENIZER_FILES

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.models.bundle import Bundle

__all__ = ["PARTS", "disk", "part_bytes", "part_of", "part_parameters", "weights"]

PARTS = ("embeddings", "attention", "mlp", "norms", "head", "other")


def weights(bundle: Bundle) -> dict[str, Measurement]:
    """`parameters` and `nonzero_parameters`: logical weights, however they are packed; shared ones count once."""
    tensors = [parameter for _, parameter in bundle.model.named_parameters()]
    nonzero = sum(int(tensor.count_nonzero()) for tensor in tensors)
    how = "counted, shared weights once, packed ones as weights"
    return {
        "parameters": Measurement(value=sum(t.numel() for t in tensors), unit="weights", method=how),
        "nonzero_parameters": Measurement(value=nonzero, unit="weights", method=how),
    }


def part_of(name: str, bundle: Bundle) -> str:
    """Which of PARTS a parameter belongs to, by the family's row.

    Biases and weights of norms inside attention or MLP count as norms; what stands below the base beside blocks and
    embeddings (a pooler) counts as head where it feeds the head, which is everywhere today.
    """
    family = bundle.family
    base = f"{family.base}." if hasattr(bundle.model, family.base) else ""
    if not name.startswith(base):
        return "head"
    inside = name.removeprefix(base)
    module = inside.rpartition(".")[0]
    if "norm" in module.rpartition(".")[2].lower() or module.rpartition(".")[2].startswith("ln_"):
        return "norms"
    for stack in family.stacks:
        if not inside.startswith(f"{stack.blocks}."):
            continue
        within = inside.removeprefix(f"{stack.blocks}.").partition(".")[2]
        linears = [path for up in stack.mlp.up for path in up] + [stack.mlp.down]
        if any(within.startswith(f"{path}.") for path in linears):
            return "mlp"
        parts = [path for one in stack.attention for path in (one.module, one.q, one.k, one.v, one.o)]
        return "attention" if any(within.startswith(f"{path}.") for path in parts) else "other"
    tables = [path for path in (*family.embeddings.values(), family.embedding_projection) if path]
    parents = {path.rpartition(".")[0] for path in tables} - {""}
    if any(inside.startswith(f"{path}.") for path in (*tables, *parents)):
        return "embeddings"
    shared = [stack.bias.table for stack in family.stacks if stack.bias]
    if any(inside.startswith(f"{path}.") for path in shared):
        return "attention"
    return "head" if "pooler" in inside else "other"


def part_parameters(bundle: Bundle) -> dict[str, int]:
    """Weights by part, only parts that the model has."""
    return _sums(bundle, {name: p.numel() for name, p in bundle.model.named_parameters()})


def part_bytes(bundle: Bundle) -> dict[str, Measurement]:
    """`bytes.embeddings` and the like: what the weights take in the model's own file, packed as they are."""
    stored = {name: _stored(name, parameter, bundle) for name, parameter in bundle.model.named_parameters()}
    how = "weights as stored in model.safetensors"
    return {
        f"bytes.{part}": Measurement(value=size, unit="B", method=how) for part, size in _sums(bundle, stored).items()
    }


def _sums(bundle: Bundle, numbers: Mapping[str, int]) -> dict[str, int]:
    sums = dict.fromkeys(PARTS, 0)
    for name, number in numbers.items():
        sums[part_of(name, bundle)] += number
    return {part: number for part, number in sums.items() if number}


def _stored(name: str, parameter: Tensor, bundle: Bundle) -> int:
    mask = math.ceil(parameter.numel() / 8)
    if name in bundle.quantized:
        codes = bundle.quantized[name]
        parts = (codes.scale, *(getattr(codes, part) for part in OPTIONAL))
        grid = [part for part in parts if part is not None]
        kept = parameter.numel() if codes.mask is None else int(codes.mask.sum())
        packed = math.ceil(kept * codes.info.bits / 8) + (0 if codes.mask is None else mask)
        return packed + sum(int(tensor.numel() * tensor.element_size()) for tensor in grid)
    if name in bundle.sparse:
        return mask + int(parameter.count_nonzero()) * parameter.element_size()
    return parameter.numel() * parameter.element_size()


def disk(folder: Path, engine: str) -> dict[str, Measurement]:
    """`bytes` = the engine's file + tokenizer + manifest (or config.json), `artifact_bytes` = the whole folder.

    folder: an artifact, or a plain Hugging Face folder with engine "torch". Raises ArtifactError without an engine's file.
    """
    folder = Path(folder)
    needed = [_engine_file(folder, engine), *(folder / name for name in TOKENIZER_FILES)]
    needed.append(folder / (MANIFEST if is_artifact(folder) else "config.json"))
    total = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    small = sum(path.stat().st_size for path in needed if path.is_file())
    return {
        "bytes": Measurement(value=small, unit="B", method=f"file of {engine} + tokenizer + manifest"),
        "artifact_bytes": Measurement(value=total, unit="B", method="all files of the folder"),
    }


def _engine_file(folder: Path, engine: str) -> Path:
    name = "model.safetensors" if engine == "torch" else f"{engine}'s file"
    if engine != "torch":
        entry = engine_entry(read_manifest(folder), engine)
        name = entry.file if entry else name
    if not (folder / name).is_file():
        raise ArtifactError(f"{name} in {folder}", "no such file", "export the model to this engine first")
    return folder / name
