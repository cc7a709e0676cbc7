"""What --dry-run expects of a quantize step, held against the step itself on a tiny model, and how it grows."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny as tiny_models
from flyweight.api import make_recipe, step_recipe
from flyweight.job import Job, prepare
from flyweight.measure.memory import OwnPeak
from flyweight.methods.quantize.expected import Sizes, expected
from flyweight.plan import make_plan
from flyweight.run import make_context
from flyweight.settings import Accept, QuantizeSettings
from flyweight.steps import step_named

BERT = [(384, 384)] * 24 + [(1536, 384), (384, 1536)] * 6
MINILM = Sizes(0.004, 0.012, 28.0, BERT, 6, 22_000_000, 22_700_000, 256, 8000, 800)
"""What a few milliseconds a sentence give: MiniLM on one core."""


def told(sizes: Sizes = MINILM, rule: Accept | None = None, **settings: Any) -> tuple[float, int]:
    return expected(QuantizeSettings(**settings), rule or Accept(), sizes)


METHODS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "hqq": {"method": "hqq", "scheme": "asymmetric", "bits": 4, "activations": "none"},
    "gptq": {"method": "gptq", "bits": 4, "activations": "none"},
    "awq": {"method": "awq", "bits": 4, "activations": "none"},
    "reconstruct": {"method": "reconstruct", "bits": 4, "activations": "none"},
    "static": {"activations": "static"},
    "train": {"method": "train", "bits": 2},
}


def test_methods_cost_what_they_are_known_for() -> None:
    seconds = {name: told(**settings)[0] for name, settings in METHODS.items()}
    assert seconds["nearest"] == min(seconds.values())
    assert seconds["gptq"] < seconds["reconstruct"]
    assert seconds["nearest"] < 5
    memory = {name: told(**settings)[1] for name, settings in METHODS.items()}
    assert memory["nearest"] == min(memory.values())
    assert memory["train"] > 20 * MINILM.model


@pytest.mark.parametrize("name", ["gptq", "awq", "reconstruct", "static"])
def test_more_texts_and_larger_layers_take_longer(name: str) -> None:
    settings = METHODS[name]
    seconds, memory = told(**settings)
    many = MINILM._replace(texts=2560)
    assert told(many, **settings)[0] > seconds
    assert told(many, **settings)[1] > memory
    wide = MINILM._replace(linears=[(2 * rows, 2 * width) for rows, width in BERT], forward=0.016)
    assert told(wide, **settings)[0] > 2 * seconds


def test_extras_are_counted() -> None:
    plain = told()
    rule = Accept(max_drop=0.01)
    assert told(rule=rule, gate="off") == plain
    gated = told(rule=rule)
    assert gated[0] >= plain[0] + 2 * MINILM.validation * MINILM.forward
    assert gated[1] == plain[1] + 4 * MINILM.model
    assert told(rule=rule, bits=4)[0] > gated[0]
    assert told(bits_per_weight=4.0, activations="none")[0] > told(activations="none")[0] + 1
    assert told(bias_correction=True)[0] > plain[0] + 1
    few = told(method="train", bits=2, max_steps=10)
    assert few[0] < told(method="train", bits=2)[0] / 5


def job_of(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Job:
    """A model of some size, so that its time is more than overhead: 2 blocks 256 wide."""
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    model = tiny("bert", hidden_size=256, intermediate_size=1024, num_hidden_layers=2, initializer_range=0.05)
    rows = [{"text": f"{sentence} {i}"} for i in range(8) for sentence in tiny_models.SENTENCES]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = step_recipe("quantize", model, {"samples": 48, **settings})
    return prepare(make_recipe(recipe, calibrate=tmp_path / "texts.jsonl"))


@pytest.mark.parametrize("name", ["gptq", "awq", "hqq", "reconstruct", "static"])
def test_a_real_step_takes_about_as_long(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Within a factor of three, a second more or less; a machine that others use is given another try."""
    changes = {"iterations": 20} if name == "reconstruct" else {}
    for attempt in range(3):
        job = job_of(tiny, tmp_path, monkeypatch, **METHODS[name], **changes)
        row = make_plan(job).rows[0]
        started = time.perf_counter()
        with OwnPeak() as peak:
            step = job.recipe.steps[0]
            step_named("quantize").function()(job.bundle, step.settings, make_context(job, 0, job.bundle, tmp_path))
        seconds = time.perf_counter() - started
        if row.seconds / 3 - 1 <= seconds <= 3 * row.seconds + 1:
            break
        assert attempt < 2, (row.seconds, seconds)
    assert row.memory_bytes / 3 <= peak.bytes <= 3 * row.memory_bytes
