"""HQQ against a loop over single weights in plain Python, its shrinkage as a minimizer, and never worse than rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flyweight.methods.quantize.grid import Grid, quantize_weight, scales_of, units
from flyweight.methods.quantize.hqq import BETA, KAPPA, ROUNDS, P, fitted, shrink, zero_points
from flyweight.models import surgery
from flyweight.models.codes import dequantize, parameter_value
from solver_cases import LAYOUTS, opened, settings_for, sparsified, stepped

Tiny = Callable[..., Path]
GRIDS = [
    Grid(bits, "asymmetric", granularity, 8) for bits in (2, 3, 4, 8) for granularity in ("tensor", "channel", "group")
]


def slow(steps: list[float], start: float, kept: list[bool], top: int) -> float:
    zero, beta = start, BETA
    for _ in range(ROUNDS):
        found = []
        for step, keep in zip(steps, kept, strict=True):
            if not keep:
                continue
            code = min(max(round(step + zero), 0), top)
            error = step - (code - zero)
            size = abs(error)
            spare = math.copysign(max(size - max(size, 1e-12) ** (P - 1) / beta, 0), error)
            found.append(code - (step - spare))
        zero = sum(found) / max(len(found), 1)
        beta *= KAPPA
    return zero


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_zero_points_equal_a_loop(grid: Grid, sparse: bool) -> None:
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(grid.bits), dtype=torch.float64)
    mask = weight.abs() > 0.5 if sparse else torch.ones(4, 24, dtype=torch.bool)
    weight = weight * mask
    scale, zero = scales_of(weight, grid)
    assert zero is not None
    steps, kept = units(weight, grid) / scale.reshape(-1, 1), units(mask, grid)
    start, top = zero.reshape(-1, 1).double(), 2**grid.bits - 1
    found = zero_points(steps, start, kept.double(), top)
    expected = [slow(steps[i].tolist(), float(start[i]), kept[i].tolist(), top) for i in range(len(steps))]
    torch.testing.assert_close(found.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_shrinkage_by_hand() -> None:
    """x = .4, beta = 2: .4 - .4^-.3 / 2 = -.258, so 0; x = -2: 2 - 2^-.3 / 2 = 1.5939, with its sign."""
    found = shrink(torch.tensor([0.4, -2.0, 0.0]), 2.0)
    torch.testing.assert_close(found, torch.tensor([0.0, -(2 - 2**-0.3 / 2), 0.0]))


def harm(codes, weight: torch.Tensor, grid: Grid) -> torch.Tensor:
    return (units(dequantize(codes) - weight, grid).abs() ** P).sum(1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_no_scale_is_worse_off_and_most_are_better(grid: Grid, sparse: bool) -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1)) ** 3
    weight[5] = 0
    weight[6] = 2.5
    mask = weight.abs() > 0.05 if sparse else None
    weight = weight if mask is None else weight * mask
    codes, near = fitted(weight, grid, mask), quantize_weight(weight, grid, mask)
    found, before = harm(codes, weight, grid), harm(near, weight, grid)
    assert (found <= before * (1 + 1e-6)).all()
    if grid.bits < 8 and grid.granularity == "channel":
        assert (found < before).float().mean() > 0.5
    assert codes.zero_point is not None
    assert codes.zero_point.dtype == torch.uint8
    assert int(codes.zero_point.max()) < 2**grid.bits
    assert int(codes.codes.max()) < 2**grid.bits
    assert (codes.scale > 0).all()
    assert mask is None or (dequantize(codes)[~mask] == 0).all()
    assert (dequantize(codes)[5] == 0).all()


@pytest.mark.parametrize("family", LAYOUTS)
def test_no_texts_are_needed(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = sparsified(opened(tiny, family))
    zeros = {name: bundle.model.get_parameter(name) == 0 for name in bundle.sparse}
    settings = settings_for(Grid(4, "asymmetric", "group", 8), "hqq", skip=("*.0.*",))
    assert not settings.calibrated
    made, _ = stepped(bundle, settings, tmp_path)
    linears = surgery.linears(made.model, made.family)
    assert {f"{name}.weight" for name in linears if ".0." not in name} <= made.quantized.keys()
    assert not [name for name in made.quantized if name.removesuffix(".weight") in linears and ".0." in name]
    for name, codes in made.quantized.items():
        assert torch.equal(parameter_value(codes), made.model.get_parameter(name))
    for name, zero in zeros.items():
        assert (made.model.get_parameter(name)[zero] == 0).all()
