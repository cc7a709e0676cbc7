"""GPTQ against the paper's equations done slowly in float64, on tiny models of every layout, and on bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flyweight.errors import StepError
from flyweight.methods.quantize import quantize
from flyweight.methods.quantize.gptq import corrected, factor
from flyweight.methods.quantize.grid import Grid, codes_at, quantize_weight, scales_of
from flyweight.methods.quantize.solving import Moments, cut_scales, gram_cost, lost
from flyweight.models import surgery
from flyweight.models.codes import dequantize, expand, parameter_value
from solver_cases import GRIDS, LAYOUTS, block_errors, context, opened, settings_for, sparsified, stepped, texts

Tiny = Callable[..., Path]


def slow(
    weight: Tensor, hessian: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Optimal brain quantization in a given order (Frantar et al. 2022, eq. 2 and 3): after every column the inverse of the
    Hessian of what is left is taken anew, and all of what is left moves. One row and one column at a time."""
    rows, columns = weight.shape
    order = sorted(range(columns), key=lambda j: -float(hessian[j, j]))
    scales = expand(scale, grid).expand_as(weight).double()
    half = 2 ** (grid.bits - 1)
    found = torch.zeros_like(weight, dtype=torch.int64)
    for i in range(rows):
        now = weight[i].double().clone()
        for at, j in enumerate(order):
            left = order[at:]
            inverse = torch.linalg.inv(hessian[left][:, left])
            step = float(now[j] / scales[i, j])
            if zero is None:
                code = min(max(round(step), 1 - half), half - 1)
                value, code = code * scales[i, j], code + half
            else:
                z = int(expand(zero, grid).expand_as(weight)[i, j])
                code = min(max(round(step) + z, 0), 2**grid.bits - 1)
                value = (code - z) * scales[i, j]
            if mask is not None and not mask[i, j]:
                value, code = torch.zeros(()).double(), half if zero is None else z
            now[left] -= (now[j] - value) / inverse[0, 0] * inverse[:, 0]
            found[i, j] = code
    return found


def hessian_of(width: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return 2 * inputs.t() @ inputs


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_optimal_brain_quantization_column_by_column(grid: Grid, sparse: bool) -> None:
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(grid.bits))
    mask = weight.abs() > 0.4 if sparse else None
    weight = weight if mask is None else weight * mask
    hessian = hessian_of(24, 60)
    made = factor(hessian, 0.01, "here")
    scale, zero = scales_of(weight, grid)
    codes = codes_at(corrected(weight, grid, scale, zero, mask, made), grid, scale, zero, mask)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    expected = slow(weight, damped, grid, scale, zero, mask)
    assert torch.equal(codes.codes.long(), expected)
    assert not torch.equal(codes.codes, quantize_weight(weight, grid, mask).codes)
    assert mask is None or (dequantize(codes)[~mask] == 0).all()


def test_many_columns_are_corrected_block_after_block() -> None:
    """More columns than are taken at once: the lazy correction of the rest is that of the paper's algorithm 1 without it."""
    weight = torch.randn(3, 300, generator=torch.Generator().manual_seed(3))
    hessian = hessian_of(300, 500)
    made = factor(hessian, 0.01, "here")
    scale, _ = scales_of(weight, Grid(4))
    steps = corrected(weight, Grid(4), scale, None, None, made)
    now = weight.double()[:, made.order]
    for j in range(300):
        code = (now[:, j] / scale[:, 0]).round().clamp(-7, 7)
        assert torch.equal(steps[:, made.order[j]].round().clamp(-7, 7).double(), code)
        error = (now[:, j] - code * scale[:, 0]) / made.upper[j, j]
        now -= error[:, None] * made.upper[j] * (torch.arange(300) >= j)


def test_error_of_the_output_falls_and_dead_inputs_are_rounded_plainly() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    hessian = hessian_of(32, 100)
    hessian[:, 5] = hessian[5] = 0
    scale, _ = scales_of(weight, Grid(3))
    codes = codes_at(corrected(weight, Grid(3), scale, None, None, factor(hessian, 0.01, "x")), Grid(3), scale, None)
    near = quantize_weight(weight, Grid(3))
    assert lost(dequantize(codes) - weight, hessian) < 0.6 * lost(dequantize(near) - weight, hessian)
    assert torch.equal(codes.codes[:, 5], near.codes[:, 5])


def test_damping_grows_until_the_hessian_is_positive_definite_and_then_gives_up() -> None:
    """[[1, a], [a, 1]] + d: positive definite where d > a - 1."""
    one = torch.tensor([[1.0, 1.5], [1.5, 1.0]], dtype=torch.float64)
    assert factor(one, 0.01, "h.0").damping == pytest.approx(1.0)
    made = factor(torch.eye(2, dtype=torch.float64), 0.01, "h.0")
    assert made.damping == 0.01
    inverse = made.upper.t() @ made.upper
    torch.testing.assert_close(inverse, torch.eye(2, dtype=torch.float64) / 1.01)
    with pytest.raises(StepError, match=r"positive definite Hessian of the inputs of h\.0, got none up to damping 10;"):
        factor(torch.tensor([[1.0, 20.0], [20.0, 1.0]], dtype=torch.float64), 0.01, "h.0")
    assert torch.isfinite(factor(torch.zeros(3, 3, dtype=torch.float64), 0.01, "all dead").upper).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_cut_scales_equal_a_loop_over_units(grid: Grid) -> None:
    """The cost of a unit from the Gram matrix is that of its own outputs, and the best share is taken."""
    generator = torch.Generator().manual_seed(5)
    weight, inputs = torch.randn(4, 24, generator=generator) ** 3, torch.randn(50, 24, generator=generator)
    cost = gram_cost((inputs.t() @ inputs / 50).double(), grid)
    scale, zero = cut_scales(weight, grid, None, cost)
    size = {"tensor": 24, "channel": 24, "group": grid.group_size or 1}[grid.granularity]

    def outputs(share: float) -> list[float]:
        cut, point = scales_of(weight, grid, share)
        lost = dequantize(codes_at(weight / expand(cut, grid), grid, cut, point)) - weight
        rows = [
            float(((inputs[:, k : k + size] @ lost[i, k : k + size]) ** 2).mean())
            for i in range(4)
            for k in range(0, 24, size)
        ]
        return [sum(rows)] if grid.granularity == "tensor" else rows

    shares = [1 - k / 20 for k in range(11)]
    found = torch.tensor([outputs(share) for share in shares])
    best = torch.tensor(shares)[found.argmin(0)]
    whole, _ = scales_of(weight, grid)
    torch.testing.assert_close(scale.flatten(), whole.flatten() * best, rtol=1e-5, atol=0)
    assert zero is None or zero.shape == scale.shape


@pytest.mark.parametrize("family", LAYOUTS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blocks_answer_better_than_by_rounding(tiny: Tiny, tmp_path: Path, family: str, grid: Grid) -> None:
    """Over all blocks of a tiny model, each fed by the quantized ones before it."""
    errors = {}
    for method in ("nearest", "gptq"):
        bundle = opened(tiny, family)
        floats = bundle.copy()
        made, notes = stepped(bundle, settings_for(grid, method), tmp_path)
        assert {f"{name}.weight" for name in surgery.linears(made.model, made.family)} <= made.quantized.keys()
        for name, codes in made.quantized.items():
            assert torch.equal(parameter_value(codes), made.model.get_parameter(name))
        errors[method] = block_errors(floats, made, texts(bundle))
    assert sum(errors["gptq"]) < sum(errors["nearest"])
    told = notes.notes["output_error"]
    assert told.keys() == surgery.linears(made.model, made.family).keys()
    assert sum(one["now"] for one in told.values()) < 0.9 * sum(one["nearest"] for one in told.values())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_pruned_weights_stay_zero_and_skipped_ones_stay_float(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = sparsified(opened(tiny, family))
    before = {name: parameter.detach().clone() for name, parameter in bundle.model.named_parameters()}
    skipped = next(reversed(surgery.linears(bundle.model, bundle.family)))
    made, _ = stepped(bundle, settings_for(GRIDS[0], "gptq", skip=(skipped,)), tmp_path)
    assert bundle.sparse.keys() - made.quantized.keys() == {f"{skipped}.weight"}
    for name, parameter in made.model.named_parameters():
        if name in made.quantized:
            assert name not in bundle.sparse or (parameter[before[name] == 0] == 0).all()
        else:
            assert torch.equal(parameter, before[name])


def test_bad_input_is_named(tiny: Tiny, tmp_path: Path) -> None:
    bundle = opened(tiny, "bert")
    with pytest.raises(StepError, match="expected texts to calibrate on, got none; give --calibrate F"):
        quantize(bundle, settings_for(GRIDS[0], "gptq"), context(tmp_path))
    bundle = opened(tiny, "bert")
    with torch.no_grad():
        bundle.model.encoder.layer[1].output.LayerNorm.weight[3] = float("inf")
    with pytest.raises(StepError, match=r"finite activations after encoder\.layer\.1, got NaN or inf"):
        stepped(bundle, settings_for(GRIDS[0], "gptq"), tmp_path)
    state = Moments(torch.zeros(2, 2).double(), torch.zeros(2).double())
    state.add(torch.tensor([[1e30, 1.0]]))
    with pytest.raises(StepError, match=r"finite activations into layer\.up"):
        state.gram("layer.up")
