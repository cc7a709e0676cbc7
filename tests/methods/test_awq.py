"""AWQ: its formula by hand, its choice against a loop over tokens, folded against unfolded models, never worse than rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flyweight import artifact
from flyweight.calibration import walk
from flyweight.methods.quantize.awq import Part, candidates, cut, factors_of
from flyweight.methods.quantize.folding import fold, source_of
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.methods.quantize.solving import lost
from flyweight.methods.quantize.work import Work, targets_of
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.models.codes import dequantize, parameter_value
from flyweight.models.storage import restore, save
from solver_cases import (
    GRIDS,
    LAYOUTS,
    block_errors,
    block_outputs,
    context,
    opened,
    settings_for,
    sparsified,
    stepped,
    texts,
)

Tiny = Callable[..., Path]


def inputs_with_loud_channels(width: int = 24, tokens: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(tokens, width, generator=generator)
    inputs[:, 3] *= 30
    inputs[:, 7] *= 10
    inputs[:, 11] = 0
    return inputs


def moments(inputs: Tensor) -> tuple[Tensor, Tensor]:
    return inputs.abs().mean(0), inputs.t() @ inputs / len(inputs)


def test_scales_by_hand() -> None:
    """mean|x| = 4, 1, 0: with a = .5 s = 2, 1, divided by sqrt(2 x 1); an input that is always zero is left alone."""
    part = Part(torch.tensor([[2.0, 1.0, 1.0], [-4.0, 1.0, 1.0]]), Grid(4, "symmetric", "channel"), None)
    found = list(candidates([part], torch.tensor([4.0, 1.0, 0.0])))
    assert len(found) == 39  # a = 0 of the first form is no scaling at all
    torch.testing.assert_close(found[9], torch.tensor([2 / 2**0.5, 1 / 2**0.5, 1.0]))
    # a = 0 of the second form: 1 / mean(|W| / max of its row) = 1 / 1 and 1 / ((.5 + .25) / 2), through their middle
    middle = (1 / 0.375) ** 0.5
    torch.testing.assert_close(found[19], torch.tensor([1 / middle, middle, 1.0]))
    assert all((one > 0).all() for one in found)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_best_candidate_is_taken_and_loud_channels_gain(grid: Grid) -> None:
    """Against errors of outputs, token by token, without the Gram matrix."""
    inputs = inputs_with_loud_channels()
    weights = [torch.randn(6, 24, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    parts = [Part(weight, grid, None) for weight in weights]
    sizes, gram = moments(inputs)

    def harm(factors: Tensor) -> float:
        found = 0.0
        for weight in weights:
            value = dequantize(quantize_weight(weight * factors, grid))
            out = (inputs / factors) @ value.t() - inputs @ weight.t()
            found += float((out**2).sum() / ((inputs @ weight.t()) ** 2).sum())
        return found

    tried = [torch.ones(24), *candidates(parts, sizes)]
    chosen = factors_of(parts, sizes, gram)
    assert chosen is not None
    assert harm(chosen) == pytest.approx(min(harm(one) for one in tried), rel=1e-3)
    assert harm(chosen) < 0.7 * harm(tried[0])
    assert chosen[3] > chosen[0]


def test_no_scaling_where_nothing_is_to_be_gained() -> None:
    """Weights that are on the grid already cannot become better."""
    weight = torch.randint(-7, 8, (6, 24), generator=torch.Generator().manual_seed(0)).float()
    weight[:, 0] = 7
    assert factors_of([Part(weight, Grid(4), None)], *moments(inputs_with_loud_channels())) is None


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_cutting_never_harms(grid: Grid, seed: int) -> None:
    weight = torch.randn(6, 24, generator=torch.Generator().manual_seed(seed)) ** 3
    mask = weight.abs() > 0.1
    _, gram = moments(inputs_with_loud_channels())
    part = Part(weight * mask, grid, mask)
    errors = [lost(dequantize(codes) - part.weight, gram) for codes in (cut(part, gram), quantize_weight(*part))]
    assert errors[0] <= errors[1]
    assert (dequantize(cut(part, gram))[~mask] == 0).all()


FOLDS = {  # what can take a factor: sites by the end of their first linear's name
    "bert": {"attention.output.dense"},
    "llama": {"q_proj", "gate_proj", "down_proj"},  # two query heads read one head of v
    "gpt2": {"c_attn", "attn.c_proj", "c_fc"},  # GELU stands between c_fc and c_proj
    "t5": {"SelfAttention.q", "SelfAttention.o", "EncDecAttention.q", "EncDecAttention.o", "wi", "wo"},  # ReLU
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_what_can_take_a_factor_and_folding_changes_no_answer(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = opened(tiny, family)
    before = block_outputs(bundle, texts(bundle))
    settings = settings_for(GRIDS[0], "awq")
    work = Work(bundle, settings, context(tmp_path), targets_of(bundle, settings))
    found = set()
    for block in walk(bundle, texts(bundle)):
        for site in block.sites:
            saved = {name: parameter.clone() for name, parameter in bundle.model.named_parameters()}
            source = source_of(work, block, site)
            for name, parameter in bundle.model.named_parameters():
                assert torch.equal(parameter, saved[name]), "trying must leave no trace"
            if source is not None:
                found.add(next(end for end in FOLDS[family] if site.name.endswith(end)))
                generator = torch.Generator().manual_seed(len(found))
                fold(work, site, source, torch.rand(site.width, generator=generator) * 3 + 0.3)
    assert found == FOLDS[family]
    for one, other in zip(block_outputs(bundle, texts(bundle)), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_integers_stay_where_a_rounded_linear_takes_a_factor(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = opened(tiny, family)
    settings = settings_for(GRIDS[1], "awq")
    work = Work(bundle, settings, context(tmp_path), targets_of(bundle, settings))
    block = next(iter(walk(bundle, texts(bundle))))
    for target in work.of("block"):
        if target.module.startswith(block.name) and "down" not in target.module and "c_proj" not in target.module:
            work.nearest(target)
    site = block.sites[-1] if family == "llama" else block.sites[1]
    before, codes = block.run(0), dict(work.codes)
    source = source_of(work, block, site)
    assert source is not None
    target = work.targets[source.name]
    floats = work.weight(target).clone()
    factors = torch.rand(site.width, generator=torch.Generator().manual_seed(1)) * 3 + 0.3
    fold(work, site, source, factors)
    torch.testing.assert_close(block.run(0), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(work.codes[target.parameter].codes, codes[target.parameter].codes)
    assert torch.equal(parameter_value(work.codes[target.parameter]), bundle.model.get_parameter(target.parameter))
    torch.testing.assert_close(work.weight(target)[source.rows], floats[source.rows] / factors[:, None])
    with torch.no_grad():
        work.take_back(target)
    torch.testing.assert_close(surgery.weight_2d(target.owner)[source.rows], floats[source.rows] / factors[:, None])


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_sites_are_never_worse_than_by_rounding(tiny: Tiny, tmp_path: Path, family: str, grid: Grid) -> None:
    bundle = opened(tiny, family)
    floats = bundle.copy()
    made, notes = stepped(bundle, settings_for(grid, "awq"), tmp_path)
    for name, codes in made.quantized.items():
        assert torch.equal(parameter_value(codes), made.model.get_parameter(name))
    told = notes.notes["output_error"]
    assert told.keys() == surgery.linears(made.model, made.family).keys()
    assert sum(one["now"] for one in told.values()) < sum(one["nearest"] for one in told.values())
    nearest, _ = stepped(opened(tiny, family), settings_for(grid, "nearest"), tmp_path)
    assert sum(block_errors(floats, made, texts(bundle))) < sum(block_errors(floats, nearest, texts(bundle)))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_factors_survive_the_disk_and_skipped_linears(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = sparsified(opened(tiny, family))
    skipped = "*.v_proj" if family == "llama" else "*.value"
    zeros = {name: bundle.model.get_parameter(name) == 0 for name in bundle.sparse}
    made, _ = stepped(bundle, settings_for(GRIDS[1], "awq", skip=(skipped,)), tmp_path)
    for name, zero in zeros.items():
        assert (made.model.get_parameter(name)[zero] == 0).all()
    assert any(codes.smooth is not None for codes in made.quantized.values())
    artifact.write_manifest(tmp_path / "a", save(made, tmp_path / "a"))
    again: Bundle = restore(tmp_path / "a")
    for one, other in zip(block_outputs(again, texts(bundle)), block_outputs(made, texts(bundle)), strict=True):
        assert torch.equal(one, other)
