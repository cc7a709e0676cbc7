"""A model of BERT-large's shape and random weights: whether `--dry-run` told time and memory before. Its answers mean nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import reviews, runner
from benchmarks.command import BESIDE, made
from benchmarks.models import MINILM
from benchmarks.runner import Job, Result, Row
from flyweight.artifact import Measurement
from flyweight.tokenization import TOKENIZER_FILES

TITLE = "BERT-large's shape, random weights"
SHAPE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
TRIAL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
TEXTS, SAMPLES = 96, 64
WAYS = {
    "fisher": (
        "heads + neurons by Fisher, linears solved",
        "prune",
        "--target heads+neurons --criterion fisher --amount 0.5 --restore linear",
        22.0,
    ),
    "taylor": ("heads by Taylor", "prune", "--target heads --criterion taylor --amount 0.5", 12.0),
    "cosine": ("layers by cosine", "prune", "--target layers --criterion cosine --amount 0.25", 12.0),
    "vocabulary": ("vocabulary to 1/3", "prune", "--target vocabulary --amount 0.6667", 10.0),
    "sparsegpt": ("SparseGPT, 50 %", "prune", "--target weights --criterion hessian --amount 0.5", 25.0),
    "distilled": (
        "every other layer, distilled for 12 steps",
        "distill",
        "--layers every-other --max-steps 12 --batch-size 8 --epochs 2",
        20.0,
    ),
}
"""{key: (summary, verb, flags, minutes)}"""


def row_of(key: str) -> str:
    return f"large-{key}"


def model(job: Job) -> Path:
    """Written once, with MiniLM's tokenizer, whose vocabulary is BERT's."""
    folder = runner.WORK / job.table / "bert-large"
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    labels = dict(enumerate(reviews.LABELS))
    given: dict[str, Any] = {
        "num_labels": len(labels),
        "id2label": labels,
        "label2id": {v: k for k, v in labels.items()},
    }
    tokens = json.loads((MINILM.folder() / "config.json").read_bytes())["vocab_size"]
    torch.manual_seed(0)
    made_new = folder.with_suffix(".new")
    shutil.rmtree(made_new, ignore_errors=True)
    config = BertConfig(vocab_size=tokens, **(TRIAL if job.trial else SHAPE), **given)
    BertForSequenceClassification(config).save_pretrained(made_new)
    for name in (*TOKENIZER_FILES, "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (MINILM.folder() / name).is_file():
            shutil.copy(MINILM.folder() / name, made_new / name)
    made_new.rename(folder)
    return folder


def texts(job: Job) -> Path:
    """A few labelled sentences, so that a row takes minutes."""
    path = runner.WORK / job.table / "few.jsonl"
    lines = job.data.train.read_text("utf-8").splitlines(keepends=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines[:: len(lines) // TEXTS][:TEXTS]), encoding="utf-8")  # in order of their hash
    return path


def run_way(key: str) -> Callable[[Job], Result]:
    """`time_ratio` and `memory_ratio`: of the step, measured / estimated, beside what they come from."""

    def run(job: Job) -> Result:
        _, verb, flags, _ = WAYS[key]
        more = [] if verb == "distill" else ["--samples", str(SAMPLES)]
        done = made(job, verb, model(job), [*flags.split(), *more], {"--train": texts(job)}, "bert-large-random")
        found = done.figures(job.work / "artifact")
        for name, took, expected in (
            ("time", "step_seconds", "estimated_seconds"),
            ("memory", "step_peak_bytes", "estimated_bytes"),
        ):
            one, other = found.get(f"{verb}.{took}"), found.get(f"{verb}.{expected}")
            if one is not None and other is not None and other.value > 0:
                _, beside, others = one.method.partition(BESIDE)
                how = f"of the step, measured / estimated by --dry-run{beside}{others}"
                found[f"{name}_ratio"] = Measurement(value=one.value / other.value, unit="x", n=1, method=how)
        shutil.rmtree(job.work / "artifact")  # gigabytes, and nothing begins with it
        return Result(found, runs=[done.command])

    return run


ROWS = tuple(
    Row(row_of(key), f"{TITLE}: {summary}", minutes, run_way(key), on_request=True)
    for key, (summary, _, _, minutes) in WAYS.items()
)
