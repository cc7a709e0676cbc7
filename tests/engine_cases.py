"""Bundles for the tests of engines, parity and runtime: made by hand, so that these tests lean on no step."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from flyweight.golden import TEXTS
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models.bundle import Bundle
from flyweight.models.codes import parameter_value
from flyweight.models.families import family_of
from flyweight.tasks import task_named
from flyweight.tokenization import open_encoder

LABELS = ("negative", "positive")


def bundle_of(folder: Path, task: str = "text-classification", labels: tuple[str, ...] | None = LABELS) -> Bundle:
    model = getattr(transformers, task_named(task).auto).from_pretrained(folder).eval()
    config = model.config
    return Bundle(
        model=model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
        family=family_of(config),
        task=task,
        encoder=open_encoder(folder, config.pad_token_id, 64, truncate=True),
        labels=labels if task == "text-classification" else None,
    )


def quantize(
    bundle: Bundle,
    grid: Grid,
    activations: str,
    embeddings: Grid | None = Grid(8),  # noqa: B008
    skip: str = "",
    prune: float = 0.0,
) -> Bundle:
    """Round all linears and embeddings of `bundle` in place; with `prune`, that share of the linears' weights goes first."""
    for path, module in bundle.model.named_modules():
        name = f"{path}.weight"
        if not isinstance(module, nn.Linear | nn.Embedding) or fnmatch.fnmatch(name, skip) or not module.weight.numel():
            continue
        how = embeddings if isinstance(module, nn.Embedding) else grid
        if how is None:
            continue
        weight, mask = module.weight.detach(), None
        if prune and isinstance(module, nn.Linear):
            mask = weight.abs() > weight.abs().flatten().kthvalue(int(prune * weight.numel())).values
        codes = quantize_weight(weight, how, mask)
        module.weight.data.copy_(parameter_value(codes))
        bundle.quantized[name] = codes
    bundle.activations = activations
    return bundle


def arrays_of(bundle: Bundle, texts: tuple[str, ...] = TEXTS, batch: int = 8) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Real text as the engine gets it, padded in batches; the last batch is a single row."""
    examples = bundle.encoder.examples(texts)
    parts = [range(i, min(i + batch, len(examples))) for i in range(0, len(examples), batch)] + [range(1)]
    return [examples.batch(part, bundle.encoder.pad) for part in parts]


def torch_answers(bundle: Bundle, arrays: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The plainest way there is to ask the model."""
    batch = {name: torch.from_numpy(arrays[name]) for name in bundle.family.inputs}
    with torch.no_grad():
        return task_named(bundle.task).answer(bundle.model.eval()(**batch), batch).numpy()
