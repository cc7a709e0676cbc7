"""Ranges of static grids, each against its formula."""

from __future__ import annotations

import pytest
import torch

from flyweight.methods.quantize.ranges import BINS, RANGES, Range, entropy, grid_of, minmax, mse, percentile
from flyweight.models.activations import round_static


def values(outlier: float = 0.0) -> torch.Tensor:
    sample = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    sample[0] = outlier
    return sample


def error(sample: torch.Tensor, found: Range) -> float:
    return float((round_static(sample, *grid_of(found)) - sample).square().mean())


def test_grid_by_hand():
    scale, zero = grid_of(Range(-1.0, 4.1))
    assert scale.item() == pytest.approx(5.1 / 255)
    assert zero.item() == 50
    assert round_static(torch.tensor([-1.0, 0.0, 4.1, 9.0, -7.0]), scale, zero).tolist() == pytest.approx(
        [-1, 0, 4.1, 4.1, -1]
    )


def test_minmax_contains_zero():
    assert minmax(torch.tensor([2.0, 3.0])) == Range(0.0, 3.0)
    assert minmax(torch.tensor([-2.0, -3.0])) == Range(-3.0, 0.0)
    assert grid_of(Range(0.0, 0.0))[0].item() == 1.0


def test_percentile_by_sorting():
    sample = values()
    ordered = sample.sort().values
    assert percentile(sample) == Range(
        pytest.approx(float(ordered[1])), pytest.approx(float(ordered[-2]))
    )  # 1e-4 of 20,000 = 2


def test_mse_is_no_worse_than_any_factor_and_cuts_an_outlier_off():
    sample = values(outlier=12.0)
    low, high = minmax(sample)
    every = [error(sample, Range(low * f, high * f)) for f in torch.linspace(0.3, 1, 36).tolist()]
    assert error(sample, mse(sample)) <= min(every) * 1.02  # its error is taken at the centres of the bins
    assert mse(sample).high < 12.0


def slow_entropy(sample: torch.Tensor) -> float:
    """Migacz 2017, in plain loops."""
    import math

    size = sample.abs()
    top = float(size.max())
    counts = torch.histc(size, BINS, 0.0, top).tolist()
    best, least = top, math.inf
    for bins in range(128, BINS + 1, 32):
        p = counts[:bins]
        p[-1] += sum(counts[bins:])
        q = [0.0] * bins
        for level in range(128):
            members = [i for i in range(bins) if i * 128 // bins == level]
            filled = [i for i in members if counts[i] > 0]
            for i in filled:
                q[i] = sum(counts[j] for j in members) / len(filled)
        total_p, total_q = sum(p), sum(q)
        divergence = 0.0
        for one, other in zip(p, q, strict=True):
            if one > 0:
                divergence += one / total_p * math.log(one / total_p / max(other / total_q, 1e-12))
        if divergence < least:
            best, least = top * bins / BINS, divergence
    return best


def test_entropy_against_plain_loops():
    sample = values(outlier=9.0)[:4000]
    found, wanted = entropy(sample), slow_entropy(sample)
    assert max(found.high, -found.low) == pytest.approx(min(wanted, 9.0), rel=1e-6)


@pytest.mark.parametrize("rule", RANGES)
def test_constant_and_zero_inputs(rule):
    for sample in (torch.zeros(500), torch.full((500,), 3.0), torch.full((500,), -3.0)):
        scale, zero = grid_of(RANGES[rule](sample))
        assert torch.allclose(round_static(sample, scale, zero), sample, rtol=0.01)
