"""Fake quantizers: exact forwards, and backwards the derivative of the surrogate that lsq.py writes down."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flyweight.methods.quantize import lsq
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.methods.quantize.lsq import InputQuantizer, WeightQuantizer
from flyweight.models.activations import fake_quantize, round_static, round_tokens
from flyweight.models.codes import dequantize

GRIDS = (
    *(Grid(bits) for bits in (2, 3, 4, 8)),
    *(Grid(bits, "asymmetric") for bits in (1, 2, 4, 8)),
    Grid(2, "ternary"),
    Grid(1, "binary"),
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def differences(function: Callable[..., Tensor], *values: Tensor, step: float = 1e-6) -> list[Tensor]:
    """d sum(weights * function) / d each value by central differences, one number at a time."""
    shape = function(*values).shape
    weights = numbers(*shape, seed=9)
    found = []
    for i, value in enumerate(values):
        slope = torch.zeros_like(value)
        for place in range(value.numel()):
            ends = []
            for sign in (1, -1):
                moved = [other.clone() for other in values]
                moved[i].view(-1)[place] += sign * step
                ends.append(float((weights * function(*moved)).sum()))
            slope.view(-1)[place] = (ends[0] - ends[1]) / (2 * step)
        found.append(slope)
    return found


def gradients(function: Callable[..., Tensor], *values: Tensor) -> list[Tensor]:
    leaves = [value.clone().requires_grad_() for value in values]
    answer = function(*leaves)
    return list(torch.autograd.grad((numbers(*answer.shape, seed=9) * answer).sum(), leaves))


def agree(function: Callable[..., Tensor], surrogate: Callable[..., Tensor], *values: Tensor) -> None:
    """Our gradient is the slope of the surrogate, and both answer alike at this point."""
    torch.testing.assert_close(function(*values), surrogate(*values), rtol=1e-12, atol=1e-12)
    for mine, slope in zip(gradients(function, *values), differences(surrogate, *values), strict=True):
        assert slope.abs().max() > 0.01
        torch.testing.assert_close(mine, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-7, 7), (-127, 127), (-2, 1), (0, 3)])
def test_steps_against_finite_differences(low: int, high: int) -> None:
    weight, scale = numbers(4, 6), torch.tensor([[0.9], [0.4], [0.21], [0.05]], dtype=torch.float64)
    start = (weight / scale).clamp(low, high)
    rest = start.round() - start
    agree(
        lambda w, s: lsq.steps(w, s, low, high),
        lambda w, s: s * ((w / s).clamp(low, high) + rest),
        weight,
        scale,
    )


def test_steps_by_hand() -> None:
    """Esser et al. 2020, eq. 3, for 3 bits and s = 0.5: 0.7 / 0.5 = 1.4 -> 1; 9 and -9 are cut off at 3 and -3."""
    weight = torch.tensor([[0.7, 9.0, -9.0]], dtype=torch.float64, requires_grad=True)
    for column, (value, by_scale, by_weight) in enumerate(((0.5, 1 - 1.4, 1.0), (1.5, 3.0, 0.0), (-1.5, -3.0, 0.0))):
        scale = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
        found = lsq.steps(weight, scale, -3, 3)[0, column]
        grads = torch.autograd.grad(found, [weight, scale])
        assert found.item() == value
        assert float(grads[1]) == pytest.approx(by_scale)
        assert grads[0].tolist() == [[by_weight if i == column else 0.0 for i in range(3)]]


def test_ternary_against_finite_differences() -> None:
    weight, scale = numbers(3, 8), torch.tensor([[0.9], [1.4], [0.3]], dtype=torch.float64)
    size = weight.abs()
    codes = torch.where(size > 0.7 * size.mean(1, keepdim=True), weight.sign(), 0.0)
    agree(
        lambda w, s: lsq.ternary(w, s, codes),
        lambda w, s: s * codes + w - weight,
        weight,
        scale,
    )


def test_binary_against_finite_differences() -> None:
    weight, scale = numbers(3, 8), torch.tensor([[0.9], [0.2], [0.1]], dtype=torch.float64)
    sign, limit = weight.sign(), lsq.CLIP * scale
    inside = weight.clamp(-limit, limit)
    assert 0 < int((weight.abs() > limit).sum()) < weight.numel()
    agree(lsq.binary, lambda w, s: s * sign + w.clamp(-limit, limit) - inside, weight, scale)


def test_static_inputs_against_finite_differences() -> None:
    """Some values saturate at both ends."""
    given = torch.cat([numbers(5, 6), torch.tensor([[-4.0, 5.0, 0.1, 3.9, -2.2, 1.0]], dtype=torch.float64)])
    scale, zero = torch.tensor([0.02], dtype=torch.float64), torch.tensor([101.3], dtype=torch.float64)
    inner = given / scale
    rest, offset = inner.round() - inner, zero.round() - zero
    codes = inner.round() + zero.round()
    assert bool((codes < 0).any())
    assert bool((codes > 255).any())
    agree(
        lsq.static,
        lambda x, s, z: s * ((x / s + rest + z + offset).clamp(0, 255) - z - offset),
        given,
        scale,
        zero,
    )


@pytest.mark.parametrize("activations", ["dynamic", "token"])
def test_run_time_grids_are_exact_and_pass_gradients_whole(activations: str) -> None:
    given = numbers(2, 3, 16).float().requires_grad_()
    found = lsq.round_input(given, activations)
    assert torch.equal(found, (fake_quantize if activations == "dynamic" else round_tokens)(given))
    assert not torch.equal(found, given)
    found.backward(torch.full_like(found, 2.0))
    assert torch.equal(given.grad, torch.full_like(given, 2.0))


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_what_is_trained_is_what_the_codes_stand_for(grid: Grid, pruned: bool, granularity: str) -> None:
    grid = grid._replace(granularity=granularity)
    weight = numbers(5, 24).float() * 0.1
    weight[3] = 0
    mask = numbers(5, 24, seed=1) > 0 if pruned else None
    if mask is not None:
        weight = weight * mask
        mask[4] = False
    quantizer = WeightQuantizer.begin(weight, grid, mask)
    with torch.no_grad():
        quantizer.log_scale.add_(numbers(*quantizer.log_scale.shape, seed=2).float() * 0.3)  # as if it had learned
    leaf = weight.clone().requires_grad_()
    value, codes = quantizer.value(leaf), quantizer.codes(weight)
    assert torch.equal(value, dequantize(codes))
    assert codes.scale.shape == quantize_weight(weight, grid, mask).scale.shape
    assert len(value.unique()) <= (1 << grid.bits) * 5
    value.backward(torch.ones_like(value))
    assert torch.isfinite(leaf.grad).all()
    assert torch.isfinite(quantizer.log_scale.grad).all()
    if mask is not None:
        assert bool((value[~mask] == 0).all())
        assert bool((leaf.grad[~mask] == 0).all())


def test_gradient_of_the_log_scale_has_the_papers_factor() -> None:
    """d/d log s = s * d/ds, times 1 / sqrt(n * hi) for n weights a scale."""
    weight = numbers(3, 10).float()
    quantizer = WeightQuantizer.begin(weight, Grid(4))
    quantizer.value(weight).sum().backward()
    scale = quantizer.scale.detach().requires_grad_()
    lsq.steps(weight, scale, -7, 7).sum().backward()
    torch.testing.assert_close(quantizer.log_scale.grad, scale.grad * scale.detach() / math.sqrt(10 * 7))


@pytest.mark.parametrize("grid", GRIDS[:8], ids=str)
def test_the_start_is_the_best_of_its_candidates(grid: Grid) -> None:
    """Row by row over all shares and the paper's formula, the slow way; never worse than the nearest grid."""
    weight = numbers(6, 40).float() * torch.logspace(-2, 1, 6)[:, None]
    weight[2, 5] = 60.0  # an outlier that is better cut off
    value = dequantize(WeightQuantizer.begin(weight, grid).codes(weight))
    low, high = (0, (1 << grid.bits) - 1) if grid.scheme == "asymmetric" else (1 - (1 << (grid.bits - 1)), 0)
    high = high or -low
    for row, found in zip(weight, value, strict=True):
        errors = []
        for share in lsq.SHARES:
            if grid.scheme == "symmetric":
                scale, zero = row.abs().max() * share / high, torch.tensor(0.0)
            else:
                scale = (row.max().clamp(min=0) - row.min().clamp(max=0)) * share / high
                zero = (-row.min().clamp(max=0) * share / scale).round()
            errors.append((((row / scale).round() + zero).clamp(low, high) - zero) * scale - row)
        if grid.scheme == "symmetric":
            scale = 2 * row.abs().mean() / math.sqrt(high)
            errors.append((row / scale).round().clamp(low, high) * scale - row)
        least = min(float(error.square().sum()) for error in errors)
        assert float((found - row).square().sum()) == pytest.approx(least, rel=1e-4)
    nearest = dequantize(quantize_weight(weight, grid))
    assert bool(((value - weight).square().sum(1) <= (nearest - weight).square().sum(1) * 1.0001).all())


def test_input_quantizer_is_the_engines_grid() -> None:
    sample = numbers(200, 16).float() + 0.3
    quantizer = InputQuantizer.begin(sample)
    assert len(list(quantizer.parameters())) == 2
    with torch.no_grad():
        quantizer.log_scale.add_(-0.4)  # some now saturate
        quantizer.edge.add_(0.013)
    scale, zero = quantizer.grid()
    assert (scale.shape, scale.dtype, zero.shape, zero.dtype) == ((1,), torch.float32, (1,), torch.uint8)
    found = quantizer.value(sample)
    assert torch.equal(found, round_static(sample, scale, zero))
    assert len(found.unique()) <= 256
    found.square().sum().backward()
    assert float(quantizer.log_scale.grad.abs()) > 0
    assert float(quantizer.edge.grad.abs()) > 0


def test_rows_of_a_table_are_rounded_as_the_table_will_be() -> None:
    table = numbers(9, 12).float()
    ids = torch.tensor([[0, 3, 3], [8, 1, 0]])
    rows = table[ids].requires_grad_()
    found = lsq.round_rows(rows, Grid(4))
    assert torch.equal(found, dequantize(quantize_weight(table, Grid(4)))[ids])
    found.sum().backward()
    assert torch.equal(rows.grad, torch.ones_like(rows))
