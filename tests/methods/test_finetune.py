from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="fine-tuning needs the extra `compress`")

import training_cases as cases  # noqa: E402
from flyweight.context import Context  # noqa: E402
from flyweight.data import pack  # noqa: E402
from flyweight.errors import Interrupted, StepError  # noqa: E402
from flyweight.methods.finetune import finetune  # noqa: E402
from flyweight.settings import FinetuneSettings  # noqa: E402
from flyweight.tasks import task_named  # noqa: E402
from flyweight.training import loop, predict  # noqa: E402

SETTINGS = FinetuneSettings(epochs=3, batch_size=8, learning_rate=3e-3)


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("bert", labels=("negative", "positive"))


def context(work: Path, **changes: Any) -> Context:
    def unused(*_: Any) -> Any:
        pytest.fail("fine-tuning asks for no other model")

    usual: dict[str, Any] = {"train": cases.examples(200), "validation": cases.examples(40, seed=1)}
    task = task_named("text-classification")
    return Context(task, seed=0, work=work, reference=unused, load=unused, device="cpu", **{**usual, **changes})


def test_learns_and_notes_its_curve(folder: Path, tmp_path: Path) -> None:
    bundle, ctx = cases.open_bundle(folder, dropout=0.0), context(tmp_path)
    held = ctx.validation
    before = (predict(bundle, held).argmax(-1) == held.labels).mean()
    found = finetune(bundle, SETTINGS, ctx)
    after = (predict(found, held).argmax(-1) == held.labels).mean()
    assert after > max(before, 0.8)
    notes = json.loads(json.dumps(ctx.notes, allow_nan=False))
    assert notes["best_metric"] == pytest.approx(after)
    assert notes["steps"] == 75
    assert [entry["step"] for entry in notes["history"]] == [25, 50, 75]
    assert notes["history"][-1]["loss"] < notes["history"][0]["loss"]
    assert all(isinstance(value, int | float) for entry in notes["history"] for value in entry.values())


def test_without_validation_the_last_weights_stay(folder: Path, tmp_path: Path) -> None:
    ctx = context(tmp_path, validation=None)
    finetune(cases.open_bundle(folder), SETTINGS.model_copy(update={"max_steps": 3}), ctx)
    assert ctx.notes["best_metric"] is None
    assert "metric" not in ctx.notes["history"][0]


def test_pruned_weights_stay_zero_and_a_resumed_run_knows_them_too(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    name = "bert.encoder.layer.0.output.dense.weight"

    def pruned() -> Any:
        bundle = cases.open_bundle(folder)
        weight = bundle.model.get_parameter(name)
        with torch.no_grad():
            weight[:, ::3] = 0.0
        return replace(bundle, sparse={name: "unstructured"})

    class Stop(cases.Notes):
        def note(self, text: str) -> None:
            if text.startswith("step 6 "):
                raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        finetune(pruned(), SETTINGS.model_copy(update={"epochs": 1.0}), context(tmp_path, progress=Stop()))
    found = finetune(pruned(), SETTINGS.model_copy(update={"epochs": 1.0}), context(tmp_path))
    weight = found.model.get_parameter(name)
    assert bool((weight[:, ::3] == 0).all())
    assert not bool((weight[:, 1::3] == 0).any())


def test_quantized_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    bundle = replace(cases.open_bundle(folder), quantized={"classifier.weight": object()})  # type: ignore[dict-item]
    with pytest.raises(StepError, match=r"float weights to fine-tune, got 1 quantized.*quantization-aware training"):
        finetune(bundle, SETTINGS, context(tmp_path))


@pytest.mark.parametrize("train", [None, pack([([2, 3], None)], None)])
def test_without_labels_it_is_refused(folder: Path, tmp_path: Path, train: Any) -> None:
    with pytest.raises(StepError, match="labelled examples to fine-tune on, got none"):
        finetune(cases.open_bundle(folder), SETTINGS, context(tmp_path, train=train))


def test_task_without_labels_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    ctx = replace(context(tmp_path), task=task_named("embedding"))
    with pytest.raises(StepError, match="got 'embedding'; use the step distill"):
        finetune(cases.open_bundle(tiny("bert"), "embedding"), SETTINGS, ctx)


def test_pairs_reach_the_model_with_their_segments(folder: Path, tmp_path: Path) -> None:
    """The label is which segment holds token 20: only a model that sees segments can learn it."""
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 2, 300)
    encoded = [
        ([2, 20, 3, 20, 3], [0, 0, 0, 1, 1]) if label else ([2, 20, 3, 20, 3], [0, 1, 1, 1, 1]) for label in labels
    ]
    data = pack(encoded, labels)
    found = finetune(cases.open_bundle(folder, dropout=0.0), SETTINGS, context(tmp_path, train=data, validation=data))
    assert (predict(found, data).argmax(-1) == labels).all()
