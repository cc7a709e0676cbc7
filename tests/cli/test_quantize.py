"""`flyweight quantize` on a model without a head, from the command line to an artifact that runs again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

import tiny as tiny_models
from flyweight.cli import main

QUICK = ("--rounds", "3", "--lengths", "8", "--batches", "1", "--leave-out", "memory,energy", "--json")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    words, draw = " ".join(tiny_models.SENTENCES).split(), random.Random(0)
    rows = [{"text": " ".join(draw.choices(words, k=draw.randint(4, 12)))} for _ in range(120)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(capsys, *arguments, statuses=(0,)):
    assert main([*map(str, arguments)]) in statuses, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_without_head_labels_or_eval(tiny, tmp_path, capsys, monkeypatch):
    """What was kept is measured on texts that nothing was tuned on, and the artifact's recipe runs from anywhere."""
    given = ("--calibrate", "texts.jsonl", "--bits", "8", "--samples", "30", *QUICK)
    told = run(capsys, "quantize", tiny("bert"), *given, "--out", "made")
    figures = told["measurements"]["result"]
    assert 0.9 < figures["quality.cosine_p1"]["value"] <= figures["quality.cosine"]["value"] < 1
    assert figures["quality.cosine"]["n"] == 60  # 120 texts less 30 to calibrate on, less a third of the rest
    assert told["steps"][0]["notes"]["peak_memory_bytes"] > 100e6
    recipe = yaml.safe_load((tmp_path / "made/recipe.yaml").read_text())
    assert Path(recipe["data"]["calibrate"]).is_absolute()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = run(capsys, "compress", tmp_path / "made/recipe.yaml", "--out", "again", "--json")
    assert again["measurements"]["result"]["quality.cosine"]["value"] == figures["quality.cosine"]["value"]


@pytest.mark.parametrize("how", [("--activations", "static"), ("--activations", "none"), ("--activations", "token")])
def test_fallbacks_reach_the_engine(tiny, tmp_path, capsys, how):
    """Layers of several widths, with inputs in float and in float altogether, in one file that agrees with torch."""
    rule = ("--calibrate", "texts.jsonl", "--samples", "30", "--bits", "2", "--quality", "0.995")
    # The gate holds on its examples; the verdict is taken on others, so few that it may differ.
    told = run(capsys, "quantize", tiny("bert"), *rule, *how, *QUICK, "--out", "made", statuses=(0, 3))
    gate = told["steps"][0]["notes"]["gate"]
    assert gate["held"]
    became = {row["became"] for row in gate["layers"]}
    assert became - {"kept"}
    page, card = (tmp_path / "made/report.html").read_text(), (tmp_path / "made/README.md").read_text()
    assert "Accuracy gate" in page
    assert gate["told"] in page
    for row in gate["layers"]:
        assert row["layer"] in page
        assert (f"{row['layer']} to {row['became']}" in card) == (row["became"] != "kept")
    assert told["verdict"]["text"]
