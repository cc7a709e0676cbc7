"""Parts that go altogether under a wish: ranked, made up for by their bias, passed over by later steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flyweight.context import Context
from flyweight.errors import SettingsError
from flyweight.measure import costs as costing
from flyweight.methods.prune import prune, restore
from flyweight.methods.quantize import quantize
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings, QuantizeSettings
from flyweight.tasks import task_named
from flyweight.training import predict
from training_cases import examples, open_bundle

Tiny = Callable[..., Path]
LABELS = ("negative", "positive")


def opened(tiny: Tiny, family: str) -> Bundle:
    return open_bundle(tiny(family, labels=LABELS))


def context(folder: Path, reference: Bundle) -> Context:
    return Context(
        task=task_named("text-classification"), seed=3, work=folder, train=examples(40), calibration=examples(24, labels=False), validation=examples(16, seed=9),
        reference=reference.copy, load=None, device="cpu",  # type: ignore[arg-type]
    )  # fmt: skip


def settings(**values: Any) -> PruneSettings:
    return PruneSettings(**{"target": "heads+neurons", "samples": 24, "cost": "flops", "shape": (1, 16), **values})


def sizes(bundle: Bundle) -> list[tuple[int, int]]:
    return [(len(one.heads[0]), one.neurons) for one in surgery.shapes(bundle.model, bundle.family)["encoder"]]


@pytest.mark.parametrize("family", ["bert", "mpnet"])
@pytest.mark.parametrize("criterion", ["fisher", "hessian", "magnitude"])
@pytest.mark.parametrize("way", ["none", "masks", "linear", "block"])
def test_a_high_wish_takes_whole_parts(tiny: Tiny, tmp_path: Path, family: str, criterion: str, way: str) -> None:
    if way == "block" and (family, criterion) != ("bert", "fisher"):
        pytest.skip("once is enough")
    bundle = opened(tiny, family)
    whole = costing.flop_costs(bundle, 16).total(surgery.shapes(bundle.model, bundle.family))
    task = context(tmp_path, bundle)
    prune(bundle, settings(speedup=12.0, whole_parts=True, criterion=criterion, restore=way), task)
    left = sizes(bundle)
    assert any(0 in one for one in left), left
    assert any(max(one) > 0 for one in left), left
    assert whole / costing.flop_costs(bundle, 16).total(surgery.shapes(bundle.model, bundle.family)) >= 12 * (1 - 1e-9)
    assert torch.isfinite(torch.from_numpy(predict(bundle, examples(4)))).all()
    assert task.notes["kept"]["encoder.0"] == left[0][1]


def test_without_leave_every_part_keeps_something(tiny: Tiny, tmp_path: Path) -> None:
    bundle = opened(tiny, "bert")
    prune(bundle, settings(speedup=4.0, criterion="fisher"), context(tmp_path, bundle))
    assert all(min(one) > 0 for one in sizes(bundle))


def test_the_bias_of_a_part_that_is_gone_is_fitted(tiny: Tiny, tmp_path: Path) -> None:
    """What is left of it can still give its mean: no constant is nearer to the dense sums."""
    dense = opened(tiny, "bert")
    for name, parameter in dense.model.named_parameters():
        if name.endswith("attention.self.value.bias"):
            parameter.data.add_(3.0)  # so that attention gives the same to all tokens, for the larger part
    cut = dense.copy()
    surgery.keep_heads(cut.model, cut.family, "encoder", 1, 0, [])
    plain = cut.copy()
    task = context(tmp_path, dense)
    told = restore.restore(cut, dense, settings(speedup=2.0, criterion="fisher", restore="linear"), task)
    one = told["bert.encoder.layer.1"]
    assert one["linear"] < 0.8 * one["without"]
    data = examples(24, seed=5)
    wanted = predict(dense, data)
    assert abs(predict(cut, data) - wanted).mean() < 0.8 * abs(predict(plain, data) - wanted).mean()


@pytest.mark.parametrize(
    "values",
    [
        {"method": "gptq", "bits": 4},
        {"activations": "dynamic", "bias_correction": True},
        {"method": "awq", "bits": 4},
        {"method": "reconstruct", "bits": 4},
        {"activations": "static"},
    ],
    ids=str,
)
def test_quantizing_passes_over_what_is_gone(tiny: Tiny, tmp_path: Path, values: dict[str, Any]) -> None:
    bundle = opened(tiny, "bert")
    surgery.keep_heads(bundle.model, bundle.family, "encoder", 1, 0, [])
    surgery.keep_neurons(bundle.model, bundle.family, "encoder", 2, [])
    before = predict(bundle, examples(8))
    made = quantize(bundle, QuantizeSettings(**values), context(tmp_path, bundle))
    assert len([name for name in made.quantized if ".layer." in name]) == 4 * 6 - 4 - 2
    assert abs(predict(made, examples(8)) - before).max() < 1.0


def test_where_it_means_nothing_it_is_refused() -> None:
    with pytest.raises((ValueError, SettingsError), match="whole_parts goes with speedup or gradual l0"):
        settings(amount=0.5, whole_parts=True)
