"""Grids against loops over single weights in plain Python, against hand-computed numbers, and by property."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flyweight.methods.quantize.grid import Grid, codes_at, quantize_weight, scales_of
from flyweight.models.codes import dequantize, integers, parameter_value

SCHEMES = [
    *itertools.product(range(2, 9), ["symmetric"]),
    *itertools.product(range(1, 9), ["asymmetric"]),
    (1, "binary"),
]


def slow(weight: list[list[float]], grid: Grid, mask: list[list[bool]]) -> list[list[float]]:
    """Dequantized values, one weight at a time, in float32 as the fast one."""
    f32 = np.float32
    rows, columns = len(weight), len(weight[0])

    def block(i: int, j: int) -> tuple[int, int]:
        if grid.granularity == "tensor":
            return 0, 0
        return i, 0 if grid.granularity == "channel" else j // (grid.group_size or 1)

    out = [[0.0] * columns for _ in range(rows)]
    for key in {block(i, j) for i in range(rows) for j in range(columns)}:
        places = [(i, j) for i in range(rows) for j in range(columns) if block(i, j) == key]
        kept = [f32(weight[i][j]) for i, j in places if mask[i][j]]
        if grid.scheme == "binary":
            mean = float(sum(Fraction(abs(float(w))) for w in kept) / len(kept)) if kept else 0.0
            for i, j in places:
                out[i][j] = (mean if weight[i][j] >= 0 else -mean) if mask[i][j] else 0.0
            continue
        low, high = min([f32(0), *kept]), max([f32(0), *kept])
        if grid.scheme == "symmetric":
            top = 2 ** (grid.bits - 1) - 1
            scale, zero, bottom = max(-low, high) / f32(top), f32(0), -top
        else:
            top, bottom = 2**grid.bits - 1, 0
            scale = (high - low) / f32(top)
            zero = f32(round(-low / scale)) if scale else f32(0)
        for i, j in places:
            if mask[i][j] and scale:
                code = min(max(round(f32(weight[i][j]) / scale) + int(zero), bottom), top)
                out[i][j] = float((f32(code) - zero) * scale)
    return out


@pytest.mark.parametrize(("bits", "scheme"), SCHEMES)
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_a_loop_over_weights(bits: int, scheme: str, granularity: str, sparse: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(5, 12, generator=generator) + 0.3
    weight[3] = 0 if scheme != "binary" else weight[3]  # a dead row must not divide by zero
    mask = torch.rand(5, 12, generator=generator) > 0.6 if sparse else torch.ones(5, 12, dtype=torch.bool)
    mask[4] = not sparse
    grid = Grid(bits, scheme, granularity, 4)  # type: ignore[arg-type]
    codes = quantize_weight(weight, grid, mask if sparse else None)
    expected = torch.tensor(slow(weight.tolist(), grid, mask.tolist()), dtype=torch.float32)
    tolerance = {"rtol": 1e-6, "atol": 0.0} if scheme == "binary" else {"rtol": 0.0, "atol": 0.0}  # a sum's order
    torch.testing.assert_close(dequantize(codes), expected, **tolerance)
    assert codes.codes.dtype == torch.uint8
    assert int(codes.codes.max()) < 2**bits
    assert (dequantize(codes)[~mask] == 0).all()
    assert codes.scale.shape == {"tensor": (1,), "channel": (5, 1), "group": (5, 3)}[granularity]
    assert (codes.zero_point is None) == (scheme != "asymmetric")


def test_symmetric_by_hand() -> None:
    # 3 bits: integers -3..3, s = 0.75 / 3 = 0.25; -0.375 -> -1.5 -> -2 and 0.125 -> 0.5 -> 0: halves go to even
    weight = torch.tensor([[0.75, -0.375, 0.125, 0.25]])
    codes = quantize_weight(weight, Grid(3, "symmetric", "channel"))
    assert codes.scale.tolist() == [[0.25]]
    assert integers(codes).tolist() == [[3, -2, 0, 1]]
    assert codes.codes.tolist() == [[7, 2, 4, 5]]
    assert dequantize(codes).tolist() == [[0.75, -0.5, 0.0, 0.25]]


def test_asymmetric_by_hand() -> None:
    # 2 bits: range -0.5..1.0, s = 0.5, z = 1; codes 0..3 stand for -0.5, 0, 0.5, 1
    weight = torch.tensor([[-0.5, 1.0, 0.1, 0.3]])
    codes = quantize_weight(weight, Grid(2, "asymmetric", "channel"))
    assert codes.zero_point is not None
    assert (codes.scale.tolist(), codes.zero_point.tolist()) == ([[0.5]], [[1]])
    assert codes.codes.tolist() == [[0, 3, 1, 2]]
    assert dequantize(codes).tolist() == [[-0.5, 1.0, 0.0, 0.5]]


def test_binary_by_hand() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.5, -0.5, 0.0, 0.0]])
    assert dequantize(quantize_weight(weight, Grid(1, "binary", "channel"))).tolist() == [
        [1.5, -1.5, 1.5, 1.5],
        [0.25, -0.25, 0.25, 0.25],
    ]
    kept = quantize_weight(weight, Grid(1, "binary", "channel"), weight != 0)  # means over what is kept
    assert dequantize(kept).tolist() == [[2.0, -2.0, 2.0, 0.0], [0.5, -0.5, 0.0, 0.0]]
    assert kept.codes.tolist() == [[1, 0, 1, 0], [1, 0, 0, 0]]


def test_binary_scale_is_the_least_squares_solution() -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    codes = quantize_weight(weight, Grid(1, "binary", "channel"))
    signs = integers(codes).float()
    best = min((float(((weight - s * signs) ** 2).sum()), float(s)) for s in torch.linspace(0.01, 2, 2000))
    assert float(codes.scale) == pytest.approx(best[1], abs=2e-3)


@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=8, max_size=8),
    st.sampled_from([case for case in SCHEMES if case[1] != "binary"]),
    st.sampled_from(["tensor", "channel", "group"]),
)
@settings(max_examples=300, deadline=None)
def test_no_weight_moves_further_than_half_a_step(values: list[float], kind: tuple[int, str], granularity: str) -> None:
    weight = torch.tensor(values).reshape(2, 4)
    codes = quantize_weight(weight, Grid(*kind, granularity, 2))  # type: ignore[arg-type]
    step = codes.scale.reshape(-1)
    step = step.repeat_interleave(weight.numel() // len(step)).reshape(2, 4)
    # asymmetric ends can lose another half where the zero-point was rounded
    room = 0.5 if kind[1] == "symmetric" else 1.0
    error = (dequantize(codes).double() - weight.double()).abs()
    assert (error <= step.double() * room * (1 + 1e-5) + 1e-36).all()
    assert (dequantize(codes)[weight == 0] == 0).all()


def test_transposed_modules_get_their_layout_back() -> None:
    weight = torch.randn(3, 5)
    codes = quantize_weight(weight, Grid(8), transposed=True)
    assert codes.info.transposed
    assert codes.info.shape == (3, 5)
    assert torch.equal(parameter_value(codes), dequantize(codes).t())


def test_more_bits_are_closer_and_groups_are_closer_than_tensors() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 16)[:, None]

    def error(grid: Grid) -> float:
        return float((dequantize(quantize_weight(weight, grid)) - weight).norm() / weight.norm())

    by_bits = [error(Grid(bits)) for bits in range(2, 9)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert error(Grid(4, "symmetric", "group", 8)) < error(Grid(4)) < error(Grid(4, "symmetric", "tensor"))


def test_a_group_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="groups of 5 do not divide 12 inputs"):
        quantize_weight(torch.randn(2, 12), Grid(4, "symmetric", "group", 5))


def test_ternary_by_hand():
    """Li et al. 2016: threshold .7 x mean|W| = .7; the scale is the mean of what is above it."""
    weight = torch.tensor([[2.0, -1.0, 0.5, -0.5]])
    codes = quantize_weight(weight, Grid(2, "ternary"))
    assert dequantize(codes).tolist() == [[1.5, -1.5, 0.0, 0.0]]
    assert (codes.info.scheme, codes.info.bits) == ("symmetric", 2)
    masked = quantize_weight(weight, Grid(2, "ternary"), torch.tensor([[False, True, True, True]]))
    third = torch.tensor(2 / 3)  # the mean of the three that are left; the threshold .467 lets all of them pass
    assert torch.allclose(dequantize(masked), third * torch.tensor([[0.0, -1.0, 1.0, -1.0]]))


def test_given_scales_by_hand() -> None:
    """Half of the range: s = .375 / 3; what lies beyond saturates; a given zero-point and a mask are respected."""
    weight = torch.tensor([[0.75, -0.375, 0.125, 0.25]])
    scale, none = scales_of(weight, Grid(3), 0.5)
    assert (scale.tolist(), none) == ([[0.125]], None)
    assert dequantize(codes_at(weight / scale, Grid(3), scale, None)).tolist() == [[0.375, -0.375, 0.125, 0.25]]
    grid = Grid(2, "asymmetric", "group", 2)
    scales, zeros = torch.tensor([[0.5, 1.0]]), torch.tensor([[1, 3]], dtype=torch.uint8)
    mask = torch.tensor([[True, True, False, True]])
    steps = torch.tensor([[-3.0, 1.4, -1.0, -2.6]])
    codes = codes_at(steps, grid, scales, zeros, mask)
    assert codes.codes.tolist() == [[0, 2, 3, 0]]
    assert dequantize(codes).tolist() == [[-0.5, 0.5, 0.0, -3.0]]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_rounding_is_onto_the_scales_of_the_whole_range(scheme: str, granularity: str) -> None:
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(2))
    grid = Grid(4, scheme, granularity, 4)  # type: ignore[arg-type]
    whole = quantize_weight(weight, grid)
    scale, zero_point = scales_of(weight, grid)
    assert torch.equal(scale, whole.scale)
    assert zero_point is None or torch.equal(zero_point, whole.zero_point)
    shares = torch.ones(whole.scale.numel(), 1)
    shares[0] = 0.5
    cut, _ = scales_of(weight, grid, shares)
    torch.testing.assert_close(cut.flatten() / scale.flatten(), shares.flatten())
