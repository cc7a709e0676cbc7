"""What cutting the vocabulary changed: nothing for a text whose tokens all stay; bytes; texts that fall into more tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks import reviews, tuned
from benchmarks.runner import Job
from benchmarks.tuned import TASK
from flyweight import artifact
from flyweight.artifact import Measurement
from flyweight.engines.engine import engine_named
from flyweight.measure.quality import answers
from flyweight.settings import DataSettings
from flyweight.splits import read_labelled
from flyweight.tokenization import Encoder, open_encoder

WEIGHTS = "model.safetensors"


def figures(job: Job, before: Path, after: Path) -> dict[str, Measurement]:
    """`vocabulary.*`: the share of held-out texts whose tokens all stay, how far their logits moved at most, how many bytes
    went against 4 x tokens x width, of the weights and of the engine's file; and how many tokens a text has."""
    texts, _ = reviews.read(tuned.data(job)["eval"])
    old, new = (_encoder(folder) for folder in (before, after))
    pieces = [[encoder.tokenizer.encode(text).tokens for text in texts] for encoder in (old, new)]
    left = new.tokenizer.get_vocab(with_added_tokens=True)
    same = np.array([all(token in left for token in tokens) for tokens in pieces[0]])
    gone = _gone(old, new)
    counted = 4 * gone * int(json.loads((before / "config.json").read_bytes())["hidden_size"])
    by, held = "onnxruntime", f"of {len(texts)} held-out texts"
    found = {
        "vocabulary.kept_share": Measurement(value=float(same.mean()), unit="share", n=len(texts), method=held),
        "vocabulary.removed": Measurement(value=gone, unit="tokens", method="sizes of the two tokenizers"),
    }
    for name, of in zip(("tokens_before", "tokens_after"), pieces, strict=True):
        mean = float(np.mean([len(tokens) for tokens in of]))
        found[f"vocabulary.{name}"] = Measurement(
            value=mean, unit="tokens", method=f"mean {held}, special ones included"
        )
    sizes = [_sizes(folder) for folder in (before, after)]
    for name in sizes[0]:
        how = "bytes that the file lost / 4 x tokens that went x width"
        ratio = (sizes[0][name] - sizes[1][name]) / counted
        found[f"vocabulary.{name}_ratio"] = Measurement(value=ratio, unit="x", method=how)
    if same.any():
        one, other = (_answers(job, folder, encoder)[same] for folder, encoder in ((before, old), (after, new)))
        how = f"largest difference of a logit in {by}, {int(same.sum())} {held} whose tokens all stay"
        found["vocabulary.moved"] = Measurement(value=float(np.abs(one - other).max()), unit="", method=how)
    return found


def _encoder(folder: Path) -> Encoder:
    manifest = artifact.read_manifest(folder)
    return open_encoder(folder, manifest.pad_token_id, manifest.max_length)


def _gone(old: Encoder, new: Encoder) -> int:
    return old.tokenizer.get_vocab_size() - new.tokenizer.get_vocab_size()


def _answers(job: Job, folder: Path, encoder: Encoder) -> NDArray[np.float32]:
    manifest = artifact.read_manifest(folder)
    examples = read_labelled(tuned.data(job)["eval"], DataSettings(), TASK, encoder, manifest.labels)
    predictor = engine_named("onnxruntime").open(folder, threads=1)
    found: NDArray[np.float32] = answers(predictor, examples, manifest.pad_token_id, batch_size=1)
    predictor.close()
    return found


def _sizes(folder: Path) -> dict[str, int]:
    engine = artifact.read_manifest(folder).engines["onnxruntime"].file
    return {name: (folder / path).stat().st_size for name, path in (("weights", WEIGHTS), ("engine", engine))}
