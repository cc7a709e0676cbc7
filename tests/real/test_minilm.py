"""A real model on a slice of real data, through all four techniques, reloaded where nothing is left of what made it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flyweight.artifact import verify
from flyweight.cli import main
from flyweight.data import Columns, rows
from flyweight.runtime import open_model

RECIPE = """
steps:
- finetune: {epochs: 1, learning_rate: 1.0e-4, max_steps: 24}
- distill: {layers: every-other, max_steps: 16, learning_rate: 2.0e-4}
- prune: {target: heads, amount: 0.25, criterion: taylor, samples: 64}
- prune: {target: neurons, amount: 0.25, criterion: taylor, samples: 64, multiple_of: 16}
- distill: {max_steps: 8}
- quantize: {bits: 8, embeddings: 8}
measure: {lengths: [32], batches: [1, 8], rounds: 5, leave_out: [energy]}
"""

FRESH = """
import json, sys
from flyweight.runtime import open_model
with open_model(sys.argv[1]) as model:
    answers = model.predict(json.load(sys.stdin))
assert not {"torch", "transformers"} & set(sys.modules)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def artifact(minilm, reviews, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    (folder / "recipe.yaml").write_text(RECIPE)
    arguments = ["--task", "text-classification", "--train", reviews.train, "--eval", reviews.eval]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLYWEIGHT_CACHE", str(folder / "cache"))
        status = main(
            [*map(str, ["compress", minilm, *arguments, "--recipe", folder / "recipe.yaml", "--out", folder / "small"])]
        )
    assert status == 0
    return folder / "small"


def test_it_is_smaller_and_says_what_it_lost(artifact):
    figures = verify(artifact).measurements
    result, reference = figures["result"], figures["reference_torch"]
    assert reference["bytes"].value / result["bytes"].value > 5
    assert reference["parameters"].value / result["parameters"].value > 1.3
    assert result["flops"].value < 0.45 * reference["flops"].value
    assert 0.5 < reference["quality.accuracy"].value < 1  # learned something in 24 steps
    difference = result["quality.accuracy.difference"]
    assert difference.low < difference.value < difference.high
    assert result["quality.accuracy"].value == pytest.approx(reference["quality.accuracy"].value + difference.value)


def test_a_fresh_process_gives_the_same_answers(artifact, reviews):
    texts = [row.text for row in rows(reviews.eval, Columns())][:50]
    with open_model(artifact) as model:
        here = model.predict(texts)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(artifact)],
        input=json.dumps(texts),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == here


def test_torch_and_the_engine_agree_on_the_labels(artifact, reviews):
    texts = [row.text for row in rows(reviews.eval, Columns())][:100]
    answers = []
    for engine in ("onnxruntime", "torch"):
        with open_model(artifact, engine=engine) as model:
            answers.append([answer[0]["label"] for answer in model.predict(texts, batch_size=1)])
    assert sum(one == other for one, other in zip(*answers, strict=True)) >= 97
