"""A model folder, a hub id or an artifact -> bundle. Weights are read from safetensors only; no code of the folder runs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open

from flyweight import artifact
from flyweight.errors import ModelError
from flyweight.models.build import open_config, open_tokenizer, quiet
from flyweight.models.bundle import Bundle
from flyweight.models.families import family_of
from flyweight.models.storage import WEIGHTS, restore
from flyweight.tasks.task import Task
from flyweight.tokenization import TOKENIZER_FILES, Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from flyweight.models.family import Family

__all__ = ["load", "origin_hash", "resolve"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")
INDEX = "model.safetensors.index.json"
UNLIMITED = 1 << 20  # relative positions set no limit, and tokenizers then write 10^30
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5")
CONVERT = (
    'convert it once where you trust it: python -c "import torch, safetensors.torch as s; s.save_file({{k: v.clone() '
    "for k, v in torch.load(r'{path}', weights_only=True).items()}}, r'{to}', {{'format': 'pt'}})\""
)


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """The folder that `source` names: a folder on disk, else a hub id, fetched into (or found in) huggingface_hub's cache.

    Without a network the cached snapshot of the revision is taken. Raises ModelError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ModelError("a hub id beside a revision", f"the folder {path}", "leave out the revision")
        return path
    if path.suffix.lower() == ".gguf":
        raise ModelError("a Hugging Face folder or a hub id", f"a GGUF file: {path}", "GGUF is not supported yet")
    if path.exists():
        raise ModelError("a model folder or a hub id", f"a file: {path}", "name the folder it is in")
    if not HUB_ID.fullmatch(str(source)):
        raise ModelError("a model folder or a hub id", f"no such folder: {source}", "check the path")
    return _snapshot(str(source), revision)


def _snapshot(name: str, revision: str | None) -> Path:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # it may have been imported before
    problem = ""
    for only_cache in (False, True):
        try:
            found = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(HUB_FILES),
                ignore_patterns=["*/*"],  # other formats and further models live in subfolders
                local_files_only=only_cache,
            )
            return Path(found)
        except Exception as error:  # network, authorization, unknown names: the libraries below have many trees
            problem = problem or str(error).strip().splitlines()[0][:200]
    at = f" at revision '{revision}'" if revision else ""
    raise ModelError(
        "a model folder or a hub id that can be fetched or is in the cache",
        f"no folder '{name}', and as a hub id{at}: '{problem}'",
        "check the name, or fetch it once with a network",
    )


def origin_hash(folder: Path) -> str:
    """sha256 over names and sha256 of config, weights and tokenizer (of an artifact also its manifest)."""
    folder = Path(folder)
    names = {"config.json", artifact.MANIFEST, INDEX, *TOKENIZER_FILES}
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and (path.name in names or path.suffix in (".safetensors", ".model")):
            digest.update(f"{path.name}\0{artifact.known_hash(path)}\n".encode())
    return digest.hexdigest()


def load(
    source: str | Path,
    task: Task,
    *,
    revision: str | None = None,
    labels: Sequence[str] | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    seed: int = 0,
) -> Bundle:
    """Open a model for `task`, in float32 on the CPU, in evaluation mode.

    labels:     the classes in the data. A head in the file is kept and its order wins: each of `labels` must be one of its
                `id2label` (compared as text; numbers are accepted where the names are LABEL_0, ...). A model without a head
                gets one with an output for each of `labels`, drawn under `seed`; torch's own random state stays as it was.
    max_length: longest input in tokens; at most the model's limit, which is the default
    truncate:   cut longer texts instead of refusing them

    Raises ModelError (folder, weights, family, labels) and ArtifactError (a damaged artifact).
    """
    folder = resolve(source, revision)
    if artifact.is_artifact(folder):
        artifact.verify(folder)
        bundle = restore(folder)
        if bundle.task != task.name:
            raise ModelError(f"an artifact for {task.name}", f"one for {bundle.task} at {folder}", "choose its task")
        if labels is not None and bundle.labels is not None:
            _matched(bundle.labels, labels, folder)
    else:
        bundle = _open(folder, task, labels, seed)
    limit = bundle.encoder.max_length
    length = limit if max_length is None else min(limit, max_length)
    return replace(bundle, encoder=bundle.encoder._replace(max_length=length, truncate=truncate))


def _open(folder: Path, task: Task, labels: Sequence[str] | None, seed: int) -> Bundle:
    config = open_config(folder)
    family = family_of(config)
    stored = _stored_names(folder)
    tokenizer = open_tokenizer(folder)
    encoder = _encoder(tokenizer, config, family, folder)
    new_head = False
    names: tuple[str, ...] | None = None
    if task.labelled:
        new_head = not _has_head(config, family, task, stored)
        names = _new_labels(labels, folder) if new_head else _kept_labels(config, labels, folder)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        config.num_labels = len(names)
    model = _read_weights(folder, config, family, task, seed, new_head)
    return Bundle(
        model=model,
        tokenizer=tokenizer,
        family=family,
        task=task.name,
        encoder=encoder,
        labels=names,
        fresh_head=new_head,
        origin=origin_hash(folder),
    )


def _encoder(tokenizer: PreTrainedTokenizerFast, config: Any, family: Family, folder: Path) -> Encoder:
    """Limits come from the model: some tokenizers carry a shorter truncation of their own (all-MiniLM: 128 of 512)."""
    positions = getattr(config, "max_position_embeddings", None)
    limit = tokenizer.model_max_length if positions is None else positions - family.position_offset
    candidates = (tokenizer.pad_token_id, getattr(config, "pad_token_id", None), tokenizer.eos_token_id)
    pad = next((number for number in candidates if number is not None), None)
    if pad is None:
        raise ModelError(f"a padding token in the tokenizer of {folder}", "none", "name one in tokenizer_config.json")
    if getattr(config, "pad_token_id", None) is None:  # a decoder's head looks for the last token that is not padding
        config.pad_token_id = pad
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"a tokenizer of at most {config.vocab_size} tokens in {folder}",
            f"{len(tokenizer)}",
            "the tokenizer of another model lies in this folder, or tokens were added without resizing the embeddings",
        )
    return Encoder(tokenizer.backend_tokenizer, int(pad), min(int(limit), UNLIMITED))


def _stored_names(folder: Path) -> set[str]:
    """Names of all weights, read from the files' headers. Raises ModelError for what is missing, damaged or a pickle."""
    found: set[str] = set()
    for path in _weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                found.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"a whole safetensors file at {path}", f"'{error}'", "fetch the model again") from None
    return found


def _weight_files(folder: Path) -> Iterator[Path]:
    if (folder / WEIGHTS).is_file():
        yield folder / WEIGHTS
        return
    index = folder / INDEX
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError, OSError) as error:
            raise ModelError(f"a readable {index}", f"'{error!r}'", "fetch the model again") from None
        for name in shards:
            if Path(name).name != name or not (folder / name).is_file():
                raise ModelError(
                    f"the {len(shards)} files of weights that {index} names", f"no {name}", "fetch the model again"
                )
            yield folder / name
        return
    for pattern in PICKLES:
        for path in sorted(folder.glob(pattern)):
            raise ModelError(
                f"safetensors weights in {folder}",
                f"{path.name}, a pickle that can run code when opened",
                CONVERT.format(path=path, to=folder / WEIGHTS),
            )
    raise ModelError(f"{WEIGHTS} in {folder}", "no weights", "fetch the model again (safetensors)")


def _has_head(config: Any, family: Family, task: Task, stored: set[str]) -> bool:
    """Whether every weight of the task's head is in the file. Raises ModelError for another task's head under its names."""
    with quiet(), torch.device("meta"):
        try:
            model = getattr(transformers, task.auto).from_config(config, trust_remote_code=False)
        except ValueError:
            raise ModelError(
                f"a family that {task.name} can be done with", f"'{family.model_type}'", "choose another model"
            ) from None
    paths = family.heads.get(task.name, ())
    head = {name for name in model.state_dict() if _below(name, paths)}
    needed = {name for name in model.state_dict() if _below(name, (*paths, *_poolers(family)))}
    if needed <= stored:
        return bool(head)
    if head & stored:  # BERT's head for tokens is called `classifier` too, but has no pooler before it
        raise ModelError(
            f"a {task.name} head or none in the model", "the head of another task", "start from the model without it"
        )
    return False


def _poolers(family: Family) -> tuple[str, str]:
    return "pooler", f"{family.base}.pooler"


def _below(name: str, paths: Sequence[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _new_labels(labels: Sequence[str] | None, folder: Path) -> tuple[str, ...]:
    if labels is None:
        raise ModelError(
            f"a model with a head in {folder}", "one without", "fine-tune it first: labelled examples give it a head"
        )
    return tuple(map(str, labels))


def _kept_labels(config: Any, labels: Sequence[str] | None, folder: Path) -> tuple[str, ...]:
    if getattr(config, "problem_type", None) == "multi_label_classification":
        raise ModelError(f"one label a text in {folder}", "a multi-label head", "choose another model")
    own = tuple(str(config.id2label[number]) for number in sorted(config.id2label))
    return own if labels is None else _matched(own, labels, folder)


def _matched(own: tuple[str, ...], labels: Sequence[str], folder: Path) -> tuple[str, ...]:
    """The model's labels in its order, by the names that the data use. Raises ModelError listing both sets."""
    data = {str(label) for label in labels}
    if data <= set(own):
        return own
    numbers = tuple(map(str, range(len(own))))
    if own == tuple(f"LABEL_{number}" for number in numbers) and data <= set(numbers):
        return numbers
    raise ModelError(
        f"the labels {', '.join(map(repr, own))} of the model in {folder}",
        ", ".join(map(repr, sorted(data))),
        "name the labels in the data as the model does, or start from a model without a head",
    )


def _read_weights(folder: Path, config: Any, family: Family, task: Task, seed: int, new_head: bool) -> PreTrainedModel:
    state = torch.random.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        with quiet():
            model, info = getattr(transformers, task.auto).from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        text = str(error).strip().splitlines()[0][:300]
        raise ModelError(
            f"weights in {folder} that fit its config.json", f"'{text}'", "fetch the model again"
        ) from None
    finally:
        torch.random.set_rng_state(state)
    # A pooler may be missing: models trained without one leave it out. Below a head that is kept `_has_head` asked for it.
    allowed = (*(family.heads.get(task.name, ()) if new_head else ()), *_poolers(family))
    missing = sorted(name for name in info["missing_keys"] if not _below(name, allowed))
    if missing:
        raise ModelError(
            f"all weights in {folder}", f"{len(missing)} missing, such as '{missing[0]}'", "fetch the model again"
        )
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ModelError(f"finite weights in {folder}", f"NaN or infinity in '{name}'", "fetch the model again")
    return cast("PreTrainedModel", model.eval())
