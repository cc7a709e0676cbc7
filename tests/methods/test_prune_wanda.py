"""Wanda against loops over single weights, and over the blocks of tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flyweight.calibration import walk
from flyweight.methods.prune.wanda import kept, wanda
from flyweight.models import surgery
from solver_cases import LAYOUTS, opened, texts

Tiny = Callable[..., Path]


def test_a_row_keeps_the_largest_products_of_weight_and_input() -> None:
    """By hand: neither the weights nor the inputs alone, nor the squares of these, come in the order of the products."""
    weight = torch.tensor([[4.0, -1.0, 2.0, 0.5], [0.1, 0.1, -0.1, 0.1]])
    norms = torch.tensor([0.5, 1.0, 0.9, 3.0])  # products 2 1 1.8 1.5 and .05 .1 .09 .3
    assert kept(weight, norms, 0.5).tolist() == [[True, False, True, False], [False, True, False, True]]
    assert kept(weight, norms, 0.25).tolist() == [[True, False, True, True], [False, True, True, True]]
    assert kept(weight, norms, 0.75).tolist() == [[True, False, False, False], [False, False, False, True]]
    assert kept(weight, norms, None, "1:2").tolist() == [[True, False, True, False], [False, True, False, True]]
    assert kept(weight, norms, 3 / 8).tolist() == [[True, False, True, False], [False, True, True, True]]


def test_what_is_zero_goes_first_even_beside_dead_inputs() -> None:
    weight = torch.tensor([[1.0, 0.0, 2.0, 3.0]])
    norms = torch.tensor([0.0, 5.0, 0.0, 1.0])
    assert kept(weight, norms, 0.25).tolist() == [[True, False, True, True]]
    assert kept(weight, norms, None, "3:4").tolist() == [[True, False, True, True]]
    assert kept(weight, norms * 0, 0.5).sum() == 2


@pytest.mark.parametrize(
    ("family", "pattern"), list(zip(LAYOUTS, ["unstructured", "2:4", "unstructured", "2:4"], strict=True))
)
def test_every_block_is_judged_by_what_the_pruned_ones_before_it_give(tiny: Tiny, family: str, pattern: str) -> None:
    bundle = opened(tiny, family)
    floats, examples = bundle.copy(), texts(bundle)
    linears = surgery.linears(floats.model, floats.family)
    share = 0.5 if pattern == "unstructured" else None
    wanda(bundle, examples, [f"{name}.weight" for name in linears], share=share, pattern=pattern)
    for block in walk(bundle, examples):  # of the pruned model: a linear reads the same now as when it was judged
        for site in block.sites:
            norms = torch.cat(list(block.stream(site))).double().norm(dim=0)
            for name, module in site.linears.items():
                weight = surgery.weight_2d(linears[name]).detach()
                size = weight.shape[1] // 2 if share else 2
                scores = weight.abs().double() * norms
                groups = scores.reshape(-1, 2 * size)
                expected = torch.zeros_like(groups, dtype=torch.bool)
                for row, own in zip(expected, groups, strict=True):
                    row[own.argsort(descending=True)[:size]] = True
                wanted = weight * expected.reshape(weight.shape)
                assert (surgery.weight_2d(module) != wanted).sum() <= 2, name  # near ties, by sums in another order
