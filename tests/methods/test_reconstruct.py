"""Learned rounding: exact values, straight-through gradients, one step at most, blocks never worse than where they started."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flyweight.calibration import Block
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.methods.quantize.reconstruct import Rounding, block_error, descend, values_of
from flyweight.models import surgery
from flyweight.models.codes import dequantize, expand, integers, parameter_value
from solver_cases import GRIDS, LAYOUTS, block_errors, opened, settings_for, sparsified, stepped, texts

Tiny = Callable[..., Path]


def rounding(grid: Grid, sparse: bool = False, rows: int = 6, columns: int = 24) -> Rounding:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(grid.bits))
    mask = weight.abs() > 0.4 if sparse else None
    weight = weight if mask is None else weight * mask
    return Rounding(weight, grid, quantize_weight(weight, grid, mask))


def moved(grid: Grid, sparse: bool = False) -> Rounding:
    """After some steps in random directions."""
    found, generator = rounding(grid, sparse), torch.Generator().manual_seed(7)
    for _ in range(4):
        found.move([torch.randn(tensor.shape, generator=generator) for tensor in found.learned], 0.06)
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_the_value_that_is_learned_is_exactly_that_of_the_codes(grid: Grid, sparse: bool) -> None:
    start, later = rounding(grid, sparse), moved(grid, sparse)
    if grid.scheme == "symmetric":
        assert torch.equal(start.codes().codes, start.start.codes)
    torch.testing.assert_close(start.value(), dequantize(start.start), rtol=1e-5, atol=1e-6)
    for one in (start, later):
        assert torch.equal(one.value(), dequantize(one.codes()))
    assert not torch.equal(later.codes().codes, start.start.codes)
    mask = start.start.mask
    assert mask is None or (later.value()[~mask] == 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_an_offset_moves_a_weight_by_one_step_at_most(grid: Grid) -> None:
    found = rounding(grid)
    with torch.no_grad():
        found.move(
            [torch.where(found.weight > 0, -1.0, 1.0), *(torch.zeros_like(one) for one in found.learned[1:])], 3.0
        )
    assert found.offset.abs().max() == 0.5
    away = (integers(found.codes()) - integers(found.start)).abs()
    assert int(away.max()) == 1
    assert ((found.value() - found.weight).abs() <= expand(found.start.scale, grid) * 1.5).all()


def test_gradients_are_those_of_the_surrogate() -> None:
    """With the rounding's slope taken as one, by finite differences of s (clamp(W / s + V + r) - z), r and z held."""
    found = moved(Grid(3, "asymmetric", "group", 8))
    wanted = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((found.value() * wanted).sum(), found.learned)
    grid, start, weight = found.grid, found.start, found.weight.double()
    assert start.zero_point is not None
    points, top = start.zero_point.double(), 7

    def parts(offset: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bottom, ceiling = -points * start.scale.double() * low, (top - points) * start.scale.double() * high
        scale = (ceiling - bottom) / top
        return weight / expand(scale, grid) + offset, scale, -bottom / scale

    at = [tensor.detach().double() for tensor in found.learned]
    steps, _, zeros = parts(*at)
    rest, left = steps.round() - steps, zeros.round().clamp(0, top) - zeros

    def surrogate(*tensors: Tensor) -> float:
        steps, scale, zeros = parts(*tensors)
        zero = expand(zeros + left, grid)
        return float((((steps + rest + zero).clamp(0, top) - zero) * expand(scale, grid) * wanted).sum())

    inside = ((steps.round() + expand((zeros + left), grid)) > 0) & ((steps.round() + expand(zeros + left, grid)) < top)
    for which, tensor in enumerate(at):
        for place in range(0, tensor.numel(), 5):
            i, j = divmod(place, tensor.shape[1])
            if which == 0 and not inside[i, j]:
                continue
            if which > 0 and not inside[i, j * 8 : j * 8 + 8].all():  # a bend of the clamp: its slope is a convention
                continue
            step = torch.zeros_like(tensor)
            step[i, j] = 1e-6
            plus, minus = [[t + sign * step if k == which else t for k, t in enumerate(at)] for sign in (1, -1)]
            slope = (surrogate(*plus) - surrogate(*minus)) / 2e-6
            assert float(gradients[which][i, j]) == pytest.approx(slope, rel=1e-3, abs=1e-4), (which, i, j)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 6)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.linear(hidden)
        return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_linear_learns_to_round_better_than_to_nearest(grid: Grid) -> None:
    """On correlated inputs; by the very error that it reports."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator) @ torch.diag(torch.logspace(0, -1.5, 24))
    inputs = [torch.randn(4, 5, 24, generator=generator) @ mixing.t() for _ in range(8)]
    torch.manual_seed(0)
    toy = Toy()
    with torch.no_grad():
        wanted = [toy(one) for one in inputs]
    block = Block("toy", "encoder", 0, toy, inputs, [((), {})] * 8, float_outputs=wanted)
    found = {"linear": Rounding(toy.linear.weight.detach().clone(), grid, quantize_weight(toy.linear.weight, grid))}
    before = {name: parameter.clone() for name, parameter in toy.named_parameters()}
    with torch.no_grad():
        start = float(block_error(block, values_of(found, {"linear": "linear.weight"})))
    codes, error = descend(block, found, {"linear": "linear.weight"}, start, 100, torch.Generator().manual_seed(1))
    assert error < 0.9 * start
    assert all(torch.equal(parameter, before[name]) for name, parameter in toy.named_parameters())
    with torch.no_grad():
        toy.linear.weight.copy_(dequantize(codes["linear"]))
        by_hand = sum(float(((toy(x) - y) ** 2).sum()) for x, y in zip(inputs, wanted, strict=True)) / (8 * 4 * 5 * 6)
    assert by_hand == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS[1:3], ids=str)
def test_blocks_end_no_worse_than_they_start(tiny: Tiny, tmp_path: Path, family: str, grid: Grid) -> None:
    bundle = sparsified(opened(tiny, family))
    zeros = {name: bundle.model.get_parameter(name) == 0 for name in bundle.sparse}
    floats = bundle.copy()
    skipped = next(reversed(surgery.linears(bundle.model, bundle.family)))
    made, notes = stepped(bundle, settings_for(grid, "reconstruct", iterations=30, skip=(skipped,)), tmp_path)
    assert bundle.sparse.keys() - made.quantized.keys() == {f"{skipped}.weight"}
    assert torch.equal(made.model.get_parameter(f"{skipped}.weight"), floats.model.get_parameter(f"{skipped}.weight"))
    for name, codes in made.quantized.items():
        assert torch.equal(parameter_value(codes), made.model.get_parameter(name))
    for name, zero in zeros.items():
        assert (made.model.get_parameter(name)[zero] == 0).all()
    told = notes.notes["block_error"]
    assert len(told) == sum(len(blocks) for blocks in surgery.blocks(made.model, made.family).values())
    for one in told.values():
        assert one["now"] <= min(one["nearest"], one["gptq"])
    assert any(one["now"] < 0.95 * min(one["nearest"], one["gptq"]) for one in told.values())
    errors = block_errors(floats, made, texts(bundle))
    if family != "t5":  # a decoder's block is told against what the quantized encoder says
        for error, one in zip(errors, told.values(), strict=True):
            assert error == pytest.approx(one["now"], rel=1e-2, abs=1e-5)


def test_a_seed_gives_the_same_codes(tiny: Tiny, tmp_path: Path) -> None:
    settings = settings_for(GRIDS[0], "reconstruct", iterations=5)
    first, second = (stepped(opened(tiny, "bert"), settings, tmp_path / turn)[0] for turn in ("first", "second"))
    assert all(torch.equal(first.quantized[name].codes, second.quantized[name].codes) for name in first.quantized)


def test_a_killed_run_goes_on_after_the_last_block(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(GRIDS[0], "reconstruct", iterations=5)
    whole, told = stepped(opened(tiny, "bert"), settings, tmp_path / "whole")
    # By its path: the package has a function of this name.
    module = importlib.import_module("flyweight.methods.quantize.reconstruct")
    solve, solved = module._solve, []

    def killed(work: Any, block: Block, *rest: Any) -> Any:
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(block.name)
        return solve(work, block, *rest)

    monkeypatch.setattr(module, "_solve", killed)
    with pytest.raises(KeyboardInterrupt):
        stepped(opened(tiny, "bert"), settings, tmp_path / "killed")
    again: list[str] = []

    def noted(work: Any, block: Block, *rest: Any) -> Any:
        again.append(block.name)
        return solve(work, block, *rest)

    monkeypatch.setattr(module, "_solve", noted)
    found, notes = stepped(opened(tiny, "bert"), settings, tmp_path / "killed")
    assert [*solved, *again] == list(told.notes["block_error"])
    assert notes.notes == told.notes
    for name, codes in whole.quantized.items():
        assert torch.equal(found.quantized[name].codes, codes.codes)
        assert torch.equal(found.quantized[name].scale, codes.scale)

    other = settings.model_copy(update={"iterations": 6})  # nothing of it belongs to these
    again.clear()
    stepped(opened(tiny, "bert"), other, tmp_path / "killed")
    assert len(again) == len(told.notes["block_error"])
