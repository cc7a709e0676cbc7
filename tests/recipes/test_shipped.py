"""Every shipped recipe runs from the command line, on a tiny model, with its steps as they are but fewer of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from flyweight.artifact import verify
from flyweight.cli import main
from flyweight.recipe import read_recipe, shipped

QUICK = ("--batches", "1,2", "--lengths", "8", "--rounds", "3", "--leave-out", "memory,energy")


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipe(name, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    generator = np.random.default_rng(0)
    for file, count in (("train", 120), ("eval", 40)):
        rows = [
            {"text": " ".join(generator.choice(["film", "river", "warm", "dull"], 5)), "label": ["no", "yes"][i % 2]}
            for i in range(count)
        ]
        (tmp_path / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = yaml.safe_load(read_recipe(name).to_yaml())
    for step in content["steps"]:
        for settings in step.values():
            if "max_steps" in settings:
                settings["max_steps"] = 2
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    files = ("--train", str(tmp_path / "train.jsonl"), "--eval", str(tmp_path / "eval.jsonl"))
    out = tmp_path / "out"
    given = ("--recipe", str(tmp_path / "recipe.yaml"), "--out", str(out), "--max-drop", "0.9", *QUICK)
    status = main(["compress", str(tiny("bert")), "--task", "text-classification", *files, *given])
    assert status == 0, capsys.readouterr().err
    manifest = verify(out)
    assert [step.name for step in manifest.steps] == [step.name for step in read_recipe(name).steps]
    assert manifest.engines["onnxruntime"].precision == "int8-dynamic"
    assert main(["predict", str(out), "a warm film"]) == 0
