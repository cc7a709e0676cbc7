"""Where a factor may go, on models that make it hard to tell; and that a model with all rounding taken back is the float one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny as models
from flyweight.calibration import walk
from flyweight.methods import quantize as package
from flyweight.methods.quantize import quantize
from flyweight.methods.quantize.folding import source_of
from flyweight.methods.quantize.work import Work, targets_of
from flyweight.models.load import load
from flyweight.settings import QuantizeSettings
from flyweight.tasks import task_named
from flyweight.training import predict
from solver_cases import block_outputs, context, opened, texts

Tiny = Callable[..., Path]
STATIC = QuantizeSettings(activations="static")


def sources(bundle: Any, tmp_path: Path) -> dict[str, str]:
    """{site: what takes its factors}"""
    work = Work(bundle, STATIC, context(tmp_path, texts(bundle)), targets_of(bundle, STATIC))
    found = {}
    for block in walk(bundle, texts(bundle)):
        for site in block.sites:
            source = source_of(work, block, site)
            if source is not None:
                found[site.name] = source.name
    return found


@pytest.mark.parametrize("size", [1, 30, 1000])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_a_gelu_of_large_numbers_is_no_relu(tmp_path: Path, activation: str, size: int) -> None:
    folder = models.write(tmp_path / "model", "bert", labels=("bad", "good"), hidden_act=activation)
    bundle = load(str(folder), task_named("text-classification"))
    with torch.no_grad():
        for name, module in bundle.model.named_modules():
            if name.endswith("intermediate.dense"):
                module.weight *= size
            elif name.endswith("output.dense") and "attention" not in name:
                module.weight /= size
    downs = [site for site in sources(bundle, tmp_path) if site.endswith("output.dense") and "attention" not in site]
    assert bool(downs) == (activation == "relu")


def test_of_a_gated_mlp_the_half_that_is_not_bent(tiny: Tiny, tmp_path: Path) -> None:
    found = sources(opened(tiny, "llama"), tmp_path)
    assert {source.rpartition(".")[2] for site, source in found.items() if site.endswith("down_proj")} == {"up_proj"}
    bundle = load(str(models.write(tmp_path / "gated", "t5", feed_forward_proj="gated-gelu")), task_named("embedding"))
    with torch.no_grad():
        for name, module in bundle.model.named_modules():
            if name.endswith("wi_0"):
                module.weight *= 300
    found = sources(bundle, tmp_path)
    assert {source.rpartition(".")[2] for site, source in found.items() if site.endswith(".wo")} == {"wi_1"}


@pytest.mark.parametrize(
    "settings",
    [
        {"activations": "static", "bits_per_weight": 8},
        {"activations": "static", "bits_per_weight": 7, "method": "gptq"},
        {"activations": "none", "bits_per_weight": 7, "method": "awq", "bias_correction": True},
        {"activations": "static", "bits": 8},
        {"activations": "static", "bits": 4, "method": "gptq", "bias_correction": True},
    ],
    ids=str,
)
def test_with_all_rounding_taken_back_a_model_answers_as_in_float(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Neurons stand in another order and factors have moved; what is looked at before must leave no float weight behind."""
    bundle = opened(tiny, "bert")
    wanted, works = block_outputs(bundle, texts(bundle))[-1], []
    whole = package._round_blocks
    monkeypatch.setattr(package, "_round_blocks", lambda work: (works.append(work), whole(work)))
    quantize(bundle, QuantizeSettings(**settings), context(tmp_path, texts(bundle)))
    (work,) = works
    rounded = block_outputs(bundle, texts(bundle))[-1]
    assert (rounded - wanted).norm() < 0.7 * wanted.norm()
    for target in work.targets.values():
        work.take_back(target)
        if target.module in work.biases:
            with torch.no_grad():
                target.owner.get_parameter("bias").copy_(work.biases[target.module])
    torch.testing.assert_close(block_outputs(bundle, texts(bundle))[-1], wanted, rtol=1e-3, atol=1e-4)
    assert len(predict(bundle, texts(bundle))) == len(texts(bundle))
