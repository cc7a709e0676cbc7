"""What a model is made of, what could be taken away or packed, and what each part costs to lose on the user's data."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

from flyweight.artifact import is_artifact, read_manifest
from flyweight.context import NoProgress, Progress
from flyweight.data import Columns, Examples, hash_share, rows
from flyweight.errors import DataError, SettingsError
from flyweight.job import guess_task
from flyweight.measure.harm import Harm
from flyweight.measure.sensitivity import sensitivity as measured
from flyweight.measure.size import part_parameters
from flyweight.measure.static import static_figures
from flyweight.models.bundle import Bundle
from flyweight.models.load import load, resolve
from flyweight.models.surgery import linears, shapes, weight_2d
from flyweight.settings import DataSettings
from flyweight.tasks import task_named

__all__ = ["inspect", "open_bundle"]

LEAST = 8  # examples: an interval from fewer says nothing


def open_bundle(
    source: str, data: DataSettings | None = None, revision: str | None = None, task: str | None = None
) -> Bundle:
    """A model folder, artifact or hub id for `task`, by default that of its own head. Raises ModelError, ArtifactError."""
    data = data or DataSettings()
    folder = resolve(source, revision)
    wanted = task_named(task or guess_task(folder))
    return load(str(folder), wanted, max_length=data.max_length, truncate=data.truncate)


def kernels(model: str, revision: str | None = None) -> dict[str, Any]:
    """What the engines ran of an artifact, by its own manifest; empty for any other model."""
    folder = resolve(model, revision)
    found = read_manifest(folder).kernels if is_artifact(folder) else {}
    return {name: report.model_dump() for name, report in found.items()}


def inspect(
    model: str,
    revision: str | None = None,
    length: int = 128,
    *,
    task: str | None = None,
    sensitivity: bool = False,
    data: str | Path | None = None,
    settings: DataSettings | None = None,
    unlabelled: bool = False,
    samples: int = 256,
    groups: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """JSON: family, task, labels, blocks with heads and neurons, parameters and bytes by part, flops, what can be
    pruned and quantized and what that would save at most.

    sensitivity: also measure what each head, each of `groups` groups of neurons, each attention, feed-forward and layer costs
                 to lose, on `samples` examples of the file `data`: key "sensitivity", a `measure.harm.Harm`
    settings:    names of the columns, longest text
    unlabelled:  pass over the labels: the cost is then how far the answers move

    Raises ModelError, ArtifactError, DataError, SettingsError; StepError and StorageError of `measure.sensitivity`.
    """
    if sensitivity and data is None:
        raise SettingsError(
            "examples to measure the sensitivity on", "none", "name a file of the kind that will be asked with --data"
        )
    if data is not None and not sensitivity:
        raise SettingsError("--sensitivity beside --data", "--data alone", "add --sensitivity or leave out --data")
    if min(samples, groups) < 1:
        raise SettingsError(
            "at least one sample and one group", f"{samples} and {groups}", "raise --samples or --groups"
        )
    bundle = open_bundle(model, settings, revision, task)
    found = _made_of(model, bundle, revision, length)
    if data is not None:
        harm = _harm(bundle, Path(data), settings or DataSettings(), unlabelled, (samples, groups), progress)
        found["sensitivity"] = harm.model_dump(mode="json")
    return found


def _harm(
    bundle: Bundle,
    data: Path,
    settings: DataSettings,
    unlabelled: bool,
    size: tuple[int, int],
    progress: Progress | None,
) -> Harm:
    progress = progress or NoProgress()
    samples, groups = size
    labelled = task_named(bundle.task).labelled and not unlabelled
    examples = _examples(bundle, data, settings, labelled, samples)
    if len(examples) < samples:
        progress.note(f"sensitivity: {data} has {len(examples)} examples, all are taken")
    return measured(bundle, examples, groups, progress=progress)


def _examples(bundle: Bundle, path: Path, data: DataSettings, labelled: bool, samples: int) -> Examples:
    """Up to `samples` of the file, chosen by hash of the text: the same ones in whatever order they stand."""
    plain = Columns(data.text, data.text_pair, None)
    next(rows(path, plain))  # what is wrong with the texts is told first
    columns = Columns(data.text, data.text_pair, data.label) if labelled else plain
    try:
        chosen = heapq.nsmallest(
            samples, rows(path, columns), key=lambda row: hash_share(f"{row.text}\0{row.text_pair or ''}")
        )
        examples = task_named(bundle.task).encode(chosen, bundle.encoder, bundle.labels if labelled else None)
    except DataError as error:
        if not labelled or not any(words in error.expected for words in (f"column '{data.label}'", "model's labels")):
            raise
        hint = f"{error.hint}; or measure how far the answers move, with --unlabelled"
        raise DataError(error.expected, error.got, hint) from None
    if len(examples) < LEAST:
        raise DataError(f"at least {LEAST} examples in {path}", f"{len(examples)}", "give more, some hundreds")
    return examples


def _made_of(model: str, bundle: Bundle, revision: str | None, length: int) -> dict[str, Any]:
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
