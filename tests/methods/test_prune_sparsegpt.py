"""SparseGPT against the paper's equations done slowly in float64, on tiny models of every layout, and on bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flyweight.errors import StepError
from flyweight.hessian import damped, factor, lost
from flyweight.methods.prune.masks import counts, is_n_of_m, masks
from flyweight.methods.prune.sparsegpt import CHOSEN, COLUMNS, corrected, sparsegpt
from flyweight.methods.prune.wanda import wanda
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings
from solver_cases import LAYOUTS, block_errors, opened, texts

Tiny = Callable[..., Path]


def gram_of(width: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return inputs.t() @ inputs / tokens


def slow(weight: Tensor, hessian: Tensor, share: float | None, group: int, stay: int = 0) -> Tensor:
    """Optimal brain surgeon, columns in turn: the inverse of the Hessian of what is left is taken anew at each of them, and all
    that is left moves for every weight that goes (Frantar and Alistarh 2023, section 3). What goes is chosen at the first of
    `group` columns: `stay` of them in each row stay, or the smallest scores go until the share of all so far is met."""
    rows, columns = weight.shape
    now, zero, gone = weight.double().clone(), weight == 0, torch.zeros_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    rest = max(counts(weight.numel(), share or 0) - int(zero.sum()), 0) / max(int((~zero).sum()), 1)
    met = went = 0
    for j in range(columns):
        if j % group == 0:
            upto = min(j + group, columns)
            scored = []
            for k in range(j, upto):
                for i in range(rows):
                    score = -1.0 if zero[i, k] else float(now[i, k] ** 2 / inverses[k][0, 0])
                    scored.append((score, k, i))
            if stay:
                for i in range(rows):
                    own = sorted((one for one in scored if one[2] == i), key=lambda one: (-one[0], one[1]))
                    for _, k, _ in own[stay:]:
                        gone[i, k] = True
            else:
                met += sum(one[0] >= 0 for one in scored)
                count = int(rest * met + 0.5) - went
                went += count
                for _, k, i in sorted(one for one in scored if one[0] >= 0)[:count]:
                    gone[i, k] = True
            gone[:, j:upto] |= zero[:, j:upto]
        for i in range(rows):
            if gone[i, j]:
                now[i, j:] -= now[i, j] / inverses[j][0, 0] * inverses[j][0]
                now[i, j] = 0
    return now


NONE_DEAD = torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize(("out", "width"), [(5, 40), (3, 2 * CHOSEN + 44)])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_share_equals_optimal_brain_surgery_across_the_edges_of_blocks(out: int, width: int, share: float) -> None:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(width))
    gram = gram_of(width, 2 * width)
    found = corrected(weight, factor(gram, 0.01, "x", sort=False), NONE_DEAD, share)
    expected = slow(weight, damped(gram, 0.01), share, CHOSEN)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    assert int((found == 0).sum()) == counts(weight.numel(), share)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (4, 8), (3, 5), (1, 24)])
def test_a_pattern_equals_optimal_brain_surgery_across_the_edges_of_blocks(n: int, m: int) -> None:
    width = (2 * COLUMNS + 20) // m * m
    weight = torch.randn(4, width, generator=torch.Generator().manual_seed(m))
    gram = gram_of(width, 2 * width)
    found = corrected(weight, factor(gram, 0.01, "x", sort=False), NONE_DEAD, None, f"{n}:{m}")
    expected = slow(weight, damped(gram, 0.01), None, m, n)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    assert ((found.reshape(4, -1, m) != 0).sum(-1) == n).all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_what_is_zero_stays_zero_and_counts(pattern: str) -> None:
    """Zeros lie unevenly: they count for all columns alike, the share comes out exactly."""
    weight = torch.randn(6, 2 * CHOSEN, generator=torch.Generator().manual_seed(1))
    weight[:, :40] *= torch.rand(6, 40, generator=torch.Generator().manual_seed(2)) > 0.7
    weight[:, 200:204] = 0
    gram = gram_of(2 * CHOSEN, 600)
    share = None if pattern == "2:4" else 0.5
    found = corrected(weight, factor(gram, 0.01, "x", sort=False), NONE_DEAD, share, pattern)
    expected = slow(weight, damped(gram, 0.01), share, *((4, 2) if pattern == "2:4" else (CHOSEN,)))
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    assert (found[weight == 0] == 0).all()
    if share:
        assert int((found == 0).sum()) == counts(weight.numel(), share)
        assert torch.equal(found != 0, corrected(found, factor(gram, 0.01, "x", sort=False), NONE_DEAD, share) != 0)
        less = corrected(weight, factor(gram, 0.01, "x", sort=False), NONE_DEAD, 0.001)
        torch.testing.assert_close(less, weight)  # more is zero already
    else:
        assert is_n_of_m(found, 2, 4)


def test_weights_of_dead_inputs_go_first_and_a_layer_of_zeros_stays_one() -> None:
    gram = gram_of(32, 100)
    gram[:, 5] = gram[5] = 0
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    weight[:, 5] = 100
    made = factor(gram, 0.01, "x", sort=False)
    found = corrected(weight, made, gram.diagonal() == 0, 8 / 256)
    assert torch.equal(found[:, 5], torch.zeros(8))
    torch.testing.assert_close(found[:, :5], weight[:, :5])  # and nothing makes up for them
    assert torch.equal(corrected(weight * 0, made, gram.diagonal() == 0, 0.5), weight * 0)
    assert torch.equal(corrected(weight * 0, made, gram.diagonal() == 0, None, "2:4"), weight * 0)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_error_of_the_output_falls_below_magnitude_and_below_the_same_mask_uncorrected(pattern: str) -> None:
    weight, gram = torch.randn(16, 64, generator=torch.Generator().manual_seed(5)), gram_of(64, 100)
    share = 0.5 if pattern == "unstructured" else None
    found = corrected(weight, factor(gram, 0.01, "x", sort=False), NONE_DEAD, share, pattern)
    settings = PruneSettings(amount=share, pattern=pattern)
    magnitude = weight * masks({"w": weight}, settings, share, 0)["w"]
    assert lost(found - weight, gram) < 0.9 * lost(magnitude - weight, gram)
    assert lost(found - weight, gram) < 0.6 * lost(weight * (found == 0), gram)


# on models


def weights_of(bundle: Bundle) -> dict[str, Tensor]:
    linears = surgery.linears(bundle.model, bundle.family)
    return {f"{name}.weight": surgery.weight_2d(module).detach().clone() for name, module in linears.items()}


@pytest.mark.parametrize(
    ("family", "pattern"), list(zip(LAYOUTS, ["unstructured", "2:4", "3:8", "unstructured"], strict=True))
)
def test_blocks_answer_better_than_by_magnitude_and_by_wanda(tiny: Tiny, family: str, pattern: str) -> None:
    """Over all blocks of a tiny model, each fed by the pruned ones before it."""
    share = 0.6 if pattern == "unstructured" else None
    floats = opened(tiny, family)
    examples, before, errors = texts(floats), weights_of(floats), {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        bundle = floats.copy()
        if method == "sparsegpt":
            notes = sparsegpt(bundle, examples, list(before), share=share, pattern=pattern)
        elif method == "wanda":
            wanda(bundle, examples, list(before), share=share, pattern=pattern)
        else:
            kept = masks(before, PruneSettings(amount=share, pattern=pattern), share, 0)
            for name, module in surgery.linears(bundle.model, bundle.family).items():
                surgery.weight_2d(module).data *= kept[f"{name}.weight"]
        for name, weight in weights_of(bundle).items():
            if share:
                assert int((weight == 0).sum()) == counts(weight.numel(), share), name
            else:
                assert is_n_of_m(weight, *map(int, pattern.split(":")))
        errors[method] = block_errors(floats, bundle, examples)
    assert sum(errors["sparsegpt"]) < sum(errors["wanda"])
    assert sum(errors["sparsegpt"]) < sum(errors["magnitude"])
    told = notes["output_error"]
    assert {f"{name}.weight" for name in told} == before.keys()
    assert sum(one["now"] for one in told.values()) < 0.9 * sum(one["uncorrected"] for one in told.values())


def test_only_what_is_named_changes(tiny: Tiny) -> None:
    bundle = opened(tiny, "gpt2")
    before = {name: parameter.detach().clone() for name, parameter in bundle.model.named_parameters()}
    names = [name for name in weights_of(bundle) if "h.1." in name][1:]
    sparsegpt(bundle, texts(bundle), names, pattern="2:4")
    changed = {name for name, parameter in bundle.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == set(names)


def test_bad_input_is_named_and_changes_nothing(tiny: Tiny) -> None:
    floats = opened(tiny, "bert")
    examples, names = texts(floats), list(weights_of(floats))
    value = "encoder.layer.1.attention.self.value"
    for method in (sparsegpt, wanda):
        bundle = floats.copy()
        with pytest.raises(StepError, match="texts to calibrate on"):
            method(bundle, examples.take([]), names, share=0.5)
        with pytest.raises(StepError, match=r"inputs of encoder\.layer\.0\.\S+ in multiples of 7 for 3:7, got 32"):
            method(bundle, examples, names, pattern="3:7")
        with pytest.raises(StepError, match=r"leaves some, got 0\.9999; lower it"):
            method(bundle, examples, names, share=0.9999)
        bundle.model.get_submodule(value).bias.data[3] = float("nan")
        with pytest.raises(StepError, match=r"into encoder\.layer\.1\.attention\.output\.dense, got NaN or inf"):
            method(bundle, examples, [n for n in names if "layer.1.attention.output" in n], share=0.5)
        bundle.model.get_submodule(value).weight.data[3] = float("inf")
        with pytest.raises(StepError, match=rf"finite weights in {value}\.weight"):
            method(bundle, examples, names, share=0.5)
        after = weights_of(bundle)
        assert all(torch.equal(weight, after[name]) for name, weight in weights_of(floats).items() if value not in name)
