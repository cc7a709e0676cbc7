"""Rows of the table of structure, run as they are on tiny models: real commands, real artifacts."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import artifacts
from benchmarks import command, runner, structure, tuned
from benchmarks.models import Model
from benchmarks.runner import Job, Table
from benchmarks.structure import large, rows, vocabulary, zeros
from benchmarks.structure.asks import Ask, row_name
from flyweight.artifact import read_manifest
from flyweight.measure.latency import Point
from tiny import SENTENCES

PARTS = "--target heads+neurons --cost flops --shape 1,32 --criterion magnitude --restore linear"
CUT = Ask("cut", "cut", "prune", f"{PARTS} --speedup 1.3", 1)
AGAIN = Ask("again", "cut to twice", "prune", PARTS, 1, start="taught", total=4.0)
TAUGHT = Ask("taught", "distilled", "distill", "--teacher {reference} --hidden-weight 1 --layers 0,2", 1, start="cut")


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """A tiny classifier in the place of a fine-tuned one, and a few labelled sentences."""
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runner, "WORK", tmp_path / "work")
    monkeypatch.setattr(rows, "POINTS", (Point(1, 32),))
    monkeypatch.setattr(rows, "MEANT", "speedup@1x32")
    data = {"train": tmp_path / "train.jsonl", "eval": tmp_path / "eval.jsonl"}
    for path, rounds in zip(data.values(), (8, 2), strict=True):
        lines = [{"text": f"{text} {'abcdefgh'[i]}", "label": ("negative", "positive")[n % 2]} for i in range(rounds) for n, text in enumerate(SENTENCES)]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    monkeypatch.setattr(tuned, "data", lambda job: data)
    made = Model("minilm", "a-model", lambda: tiny("bert", labels=("negative", "positive")))
    artifacts.write(made.folder(), tuned.folder(made, 0))
    return made


@pytest.mark.slow
def test_commands_follow_each_other(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut, taught by the reference, cut by what the second lacks: each begins with what the one before wrote."""
    asks = [ask._replace(model=model) for ask in (CUT, TAUGHT, AGAIN)]
    table = Table("structure", "", "", tuple(row for row in rows.rows(asks) if "fp32" not in row.name), "")
    monkeypatch.setattr(runner, "TRIAL", True)
    for ask in asks:
        assert runner.run_row(table, ask.row(0), 0), runner.failure("structure", ask.row(0))
    cut, taught, again = (runner.load("structure", ask.row(0)) for ask in asks)
    assert cut is not None
    assert taught is not None
    assert again is not None
    assert cut["runs"][0].startswith("flyweight prune a-model-tuned --train train.jsonl --target heads+neurons")
    assert taught["runs"][0].startswith(
        f"flyweight distill {row_name(model, 'cut', 0)} --train train.jsonl --teacher a-model-tuned"
    )
    assert "--max-steps 4" in taught["runs"][0]
    figures = cut["figures"]
    assert figures["wish.speedup"]["value"] >= 1.3
    assert figures["prune.seconds"]["value"] > figures["prune.step_seconds"]["value"] > 0
    assert figures["prune.step_peak_bytes"]["value"] > 50e6
    assert figures["prune.estimated_bytes"]["value"] > 50e6
    assert figures["speedup@1x32"]["value"] > 0
    assert figures["latency_ms.p50@1x32"]["value"] > 0
    assert figures["bytes"]["value"] > 0
    speed = taught["figures"]["speedup@1x32"]["value"]
    asked = float(again["runs"][0].split("--speedup ")[1].split()[0])
    assert asked == pytest.approx(1.02 * 4 / speed, abs=0.006)
    manifest = read_manifest(runner.WORK / "structure" / asks[2].row(0) / "artifact")
    assert [step.name for step in manifest.steps] == ["prune", "distill", "prune"]
    assert len(again["scores"]) == len(SENTENCES) * 2
    assert again["figures"]["prune.step_seconds"]["value"] == pytest.approx(manifest.steps[2].seconds)


def test_a_vocabulary_is_compared_text_by_text(model: Model, tiny: Callable[..., Path], tmp_path: Path) -> None:
    """By hand: `quiet` goes, so that the texts with it fall into letters, and no other answer moves."""
    from flyweight import artifact
    from flyweight.engines import onnxruntime
    from flyweight.models.load import load
    from flyweight.models.storage import save
    from flyweight.models.vocabulary import keep_tokens
    from flyweight.tasks import task_named

    bundle = load(str(model.folder()), task_named("text-classification"))
    tokens = bundle.encoder.tokenizer.get_vocab(with_added_tokens=True)
    made, _ = keep_tokens(bundle, {number for token, number in tokens.items() if token != "quiet"})
    after = tmp_path / "after"
    with artifact.write_folder(after) as folder:
        manifest = save(made, folder)
        engine = onnxruntime.export(made, folder)
        artifact.write_manifest(folder, manifest.model_copy(update={"engines": {"onnxruntime": engine}}))
    job = Job("structure", "row", 0, tmp_path / "row")
    found = vocabulary.figures(job, tuned.folder(model, 0), after)
    assert found["vocabulary.removed"].value == 1
    assert found["vocabulary.kept_share"].value == pytest.approx(1 - 1 / len(SENTENCES))
    assert found["vocabulary.moved"].value < 1e-5
    assert found["vocabulary.tokens_after"].value - found["vocabulary.tokens_before"].value == pytest.approx(
        (len("quiet") - 1) / len(SENTENCES)
    )
    for name in ("weights", "engine"):  # 4 bytes x 32 channels: a header of some bytes more or less shows
        assert found[f"vocabulary.{name}_ratio"].value == pytest.approx(1, abs=0.5)


def test_a_vocabulary_that_changed_answers_is_told(model: Model, tiny: Callable[..., Path], tmp_path: Path) -> None:
    other = artifacts.write(tiny("bert", labels=("negative", "positive"), seed=1), tmp_path / "other")
    before = tuned.folder(model, 0)
    kept = vocabulary._encoder(before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocabulary, "_sizes", lambda folder: {"weights": 128 if folder == before else 0})
        patch.setattr(vocabulary, "_encoder", lambda folder: kept)
        patch.setattr(vocabulary, "_gone", lambda old, new: 1)
        found = vocabulary.figures(Job("structure", "row", 0, tmp_path / "row"), before, other)
    assert found["vocabulary.moved"].value > 1e-3
    assert found["vocabulary.weights_ratio"].value == 1


def test_texts_that_fall_apart_although_their_tokens_stay_are_told(model: Model, tmp_path: Path) -> None:
    """By a tokenizer that has all tokens and reads otherwise: without what stands around a text."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    before, after = tuned.folder(model, 0), tmp_path / "after"
    shutil.copytree(before, after)
    kept = vocabulary._encoder(before)
    bare = Tokenizer.from_str(kept.tokenizer.to_str())
    bare.post_processor = TemplateProcessing(single="$A", pair="$A $B")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            vocabulary, "_encoder", lambda folder: kept if folder == before else kept._replace(tokenizer=bare)
        )
        patch.setattr(vocabulary, "_gone", lambda old, new: 1)
        found = vocabulary.figures(Job("structure", "row", 0, tmp_path / "row"), before, after)
    assert found["vocabulary.kept_share"].value == 1
    assert found["vocabulary.moved"].value > 1e-3


def test_times_of_zeros(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="package openvino is not installed")
    monkeypatch.setattr(zeros, "MINILM", model)
    monkeypatch.setattr(zeros, "POINTS", (Point(1, 16),))
    job = Job("structure", zeros.NAME, 0, runner.WORK / "structure" / zeros.NAME, trial=True)
    job.work.mkdir(parents=True)
    for row in zeros.KINDS.values():
        shutil.copytree(tuned.folder(model, 0), job.near(row) / "artifact")
    found = zeros.run_latency(job).figures
    for engine in zeros.ENGINES:
        for kind in zeros.KINDS:
            assert found[f"{zeros.candidate(kind, engine)}:{zeros.faster(engine)}@1x16"].value > 0
        assert found[f"{zeros.candidate(zeros.DENSE, engine)}:{zeros.faster(engine)}@1x16"].value == 1
    shutil.rmtree(job.near(zeros.KINDS["2:4"]))
    with pytest.raises(SystemExit, match="expected the artifact of minilm-zeros-magnitude-2of4-s0, got none"):
        zeros.run_latency(job)


def test_estimates_of_the_large_model(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "MINILM", model)
    monkeypatch.setattr(runner, "TRIAL", True)
    given = Path(tuned.data(Job("", "", 0, tmp_path))["train"])
    monkeypatch.setattr(large, "texts", lambda job: given)
    monkeypatch.setattr(
        large, "WAYS", {"cosine": ("", "prune", "--target layers --criterion cosine --amount 0.25", 1.0)}
    )
    table = Table("structure", "", "", tuple(row for row in structure.ROWS if row.name == "large-cosine"), "")
    assert runner.run_row(table, "large-cosine", 0), runner.failure("structure", "large-cosine")
    record = runner.load("structure", "large-cosine")
    assert record is not None
    figures = record["figures"]
    for name, took, told in (
        ("time", "step_seconds", "estimated_seconds"),
        ("memory", "step_peak_bytes", "estimated_bytes"),
    ):
        by_hand = figures[f"prune.{took}"]["value"] / figures[f"prune.{told}"]["value"]
        assert figures[f"{name}_ratio"]["value"] == pytest.approx(by_hand)
    assert not (runner.WORK / "structure" / "large-cosine" / "artifact").exists()
    config = json.loads((runner.WORK / "structure" / "bert-large" / "config.json").read_bytes())
    assert (config["hidden_size"], config["num_hidden_layers"]) == (64, 4)


def test_a_command_stops_at_its_limit(tmp_path: Path) -> None:
    """As by Ctrl-C, also where the shell has told to ignore that."""
    code = f"""
import sys, time
try:
    time.sleep(60)
except KeyboardInterrupt:
    open({str(tmp_path / "kept")!r}, "w").write("state")
    sys.exit(130)
"""
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = time.perf_counter()
    try:
        with pytest.raises(SystemExit, match="stopped after 0 minutes; the same command goes on where it was"):
            command.watch([command.sys.executable, "-c", code], {}, tmp_path / "log", limit_s=1.5)
    finally:
        signal.signal(signal.SIGINT, former)
    assert time.perf_counter() - start < 30
    assert (tmp_path / "kept").read_text() == "state"


def test_what_ends_in_time_is_no_stop(tmp_path: Path) -> None:
    found = command.watch([command.sys.executable, "-c", "pass"], {}, tmp_path / "log", limit_s=60)
    assert np.isfinite(found.seconds)
