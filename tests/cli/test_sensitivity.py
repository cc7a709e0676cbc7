"""`flyweight inspect --sensitivity`: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flyweight import inspect
from flyweight.cli import main
from flyweight.inspection import open_bundle
from flyweight.measure.harm import Harm
from flyweight.measure.sensitivity import sensitivity
from tiny import SENTENCES

LABELS = ("negative", "positive")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [{"text": text, "label": LABELS[i % 2]} for i, text in enumerate(SENTENCES)]
    return write(tmp_path / "labelled.jsonl", rows)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "plain.jsonl", [{"text": text} for text in SENTENCES])


@pytest.fixture
def model(tiny: Any) -> Path:
    found: Path = tiny("distilbert", labels=LABELS)
    return found


def words(model: Path, data: Path, *more: str) -> list[str]:
    return ["inspect", str(model), "--sensitivity", "--data", str(data), "--groups", "2", *more]


def test_tables_and_page(model: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(words(model, labelled, "--out", str(page))) == 0
    shown = capsys.readouterr()
    # 4 x (4 heads + attention + 2 groups + feed-forward + layer)
    assert "sensitivity: 36 parts on 15 examples, about " in shown.err
    assert f"{labelled} has 15 examples, all are taken" in shown.err
    for text in ("rise of the loss", "15 (", "encoder 3, whole layer", "heads: cost most", "heads: cost least",
                 "neuron groups, 0 writes most: cost least", "points", f"heat maps: {page}"):  # fmt: skip
        assert text in shown.out, text
    html = page.read_text("utf-8")
    assert html.startswith("<!doctype html>")
    assert html.count("<svg") == 3
    assert str(model.parent) not in html, "folders of the maker stay private"
    assert model.name in html
    for text in SENTENCES:
        assert text not in html


def test_json_is_what_the_function_gives(model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(model, labelled, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "distilbert"
    assert found["parameters"]
    again = inspect(str(model), sensitivity=True, data=labelled, groups=2)["sensitivity"]
    for timed in (found["sensitivity"], again):
        del timed["seconds"], timed["expected"]
    assert found["sensitivity"] == again
    grid = Harm(**found["sensitivity"], seconds=0, expected=0)
    assert len(grid.of("head")) == 16
    assert sorted({part.block for part in grid.of("layer")}) == [0, 1, 2, 3]
    bundle = open_bundle(str(model))
    texts = bundle.encoder.examples(SENTENCES)
    direct = sensitivity(bundle, type(texts)(texts.ids, None, texts.starts, np.arange(15) % 2), 2)
    for one, other in zip(grid.parts, direct.parts, strict=True):
        assert one.cost.value == pytest.approx(other.cost.value, abs=1e-5)


def test_samples_are_the_same_in_any_order(model: Path, labelled: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned.jsonl"
    turned.write_text("".join(reversed(labelled.read_text().splitlines(keepends=True))))
    one, two = (
        inspect(str(model), sensitivity=True, data=path, groups=1, samples=9)["sensitivity"]
        for path in (labelled, turned)
    )
    assert one["examples"] == two["examples"] == 9
    assert one["tokens"] == two["tokens"]
    assert one["whole"]["loss"] == pytest.approx(two["whole"]["loss"], abs=1e-6)


def test_without_labels(model: Path, plain: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for data in (plain, labelled):
        assert main(words(model, data, "--unlabelled", "--json")) == 0
        found = json.loads(capsys.readouterr().out)["sensitivity"]
        assert (found["cost"], found["metric"], found["whole"]) == ("KL divergence", "same answer", {})


def test_another_task_and_artifacts(
    model: Path, small: Path, vectors: Path, plain: Path, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, data, more, cost in (
        (model, plain, ["--task", "embedding"], "1 - cosine"),
        (vectors, plain, [], "1 - cosine"),
        (small, labelled, [], "rise of the loss"),
    ):
        assert main(words(path, data, "--json", *more)) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["sensitivity"]["cost"] == cost
    assert found["artifact"]


Made = Callable[[Path], list[str]]
BAD: dict[str, tuple[Made, str]] = {
    "no data": (lambda at: ["--sensitivity"], "expected examples to measure the sensitivity on, got none"),
    "data alone": (lambda at: ["--data", str(at / "labelled.jsonl")], "expected --sensitivity beside --data"),
    "page alone": (lambda at: ["--out", str(at / "page.html")], "expected --sensitivity beside --out"),
    "no such file": (lambda at: ["--sensitivity", "--data", str(at / "no.jsonl")], "no such file"),
    "empty file": (lambda at: ["--sensitivity", "--data", str(write(at / "e.jsonl", []))], "an empty file"),
    "few rows": (
        lambda at: ["--sensitivity", "--data", str(write(at / "f.jsonl", [{"text": "a", "label": "positive"}] * 7))],
        "expected at least 8 examples",
    ),
    "no labels": (
        lambda at: ["--sensitivity", "--data", str(at / "plain.jsonl")],
        "or measure how far the answers move, with --unlabelled",
    ),
    "an empty label": (
        lambda at: ["--sensitivity", "--data", str(write(at / "l.jsonl", [{"text": "a", "label": ""}]))],
        "l.jsonl:1, got none; mend or drop the row; or measure how far",
    ),
    "another label": (
        lambda at: ["--sensitivity", "--data", str(write(at / "o.jsonl", [{"text": "a", "label": "odd"}] * 9))],
        "got 'odd'",
    ),
    "no text": (
        lambda at: ["--sensitivity", "--data", str(write(at / "t.jsonl", [{"body": "a", "label": "odd"}]))],
        "a column 'text' at",
    ),
    "a text too long": (
        lambda at: ["--sensitivity", "--data", str(write(at / "t.jsonl", [{"text": "a " * 99, "label": "positive"}]))],
        "cut long ones with --truncate",
    ),
    "an unknown task": (
        lambda at: ["--sensitivity", "--data", str(at / "plain.jsonl"), "--task", "embeding"],
        "did you mean 'embedding'?",
    ),
    "a page in no folder": (
        lambda at: ["--sensitivity", "--data", str(at / "labelled.jsonl"), "--out", str(at / "no" / "page.html")],
        "no folder",
    ),
    "a folder for a page": (
        lambda at: ["--sensitivity", "--data", str(at / "labelled.jsonl"), "--out", str(at)],
        "a folder at",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_in_one_line(
    case: str, model: Path, plain: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, wanted = BAD[case]
    arguments = made(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert main(["inspect", str(model), *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: expected ")
    assert wanted in lines[0]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    if case in ("no text", "a text too long", "an unknown task", "few rows"):
        assert "--unlabelled" not in lines[0], "it would not help"


def test_a_model_without_a_head_cannot_be_held_against_labels(
    tiny: Any, labelled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tiny("bert"), labelled, "--task", "text-classification")) == 1
    assert "expected a model with a head" in capsys.readouterr().err


def test_a_damaged_artifact_is_refused(
    small: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    file = broken / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(words(broken, labelled)) == 1
    assert "sha256 differs" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--samples", "0"], ["--groups", "0"], ["--samples", "many"]])
def test_wrong_usage(flags: list[str], model: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(model, labelled), *flags]) == 2
    assert flags[0] in capsys.readouterr().err


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom flyweight.cli import main\nstatus = main(['inspect', '--help'])\n"
        "print(status, sorted({'torch', 'transformers', 'numpy.testing'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert "--sensitivity" in done.stdout
