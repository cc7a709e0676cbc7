"""Structured OBS against all subsets tried out, the closed form, and what tiny models really answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.hessian import Moments, inverse, relative
from flyweight.methods.prune import structured
from flyweight.methods.prune.obs import (
    COLUMNS,
    Ordered,
    _Left,
    make_up,
    observed,
    ordered,
    restored,
    score_of,
    shifted,
)
from flyweight.methods.prune.scores import Group, groups, readers
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from solver_cases import block_errors, block_outputs, opened, texts

Tiny = Callable[..., Path]


def inputs_of(width: int, tokens: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    """[tokens, in] float64, correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return mixed + shift * torch.randn(width, generator=generator, dtype=torch.float64)


def case(out: int, units: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, inputs, gram)"""
    inputs = inputs_of(units * size, 3 * units * size, seed)
    weight = torch.randn(out, units * size, generator=torch.Generator().manual_seed(seed + 100))
    return weight, inputs, inputs.t() @ inputs / len(inputs)


def spread(keep: list[int], size: int) -> list[int]:
    return [unit * size + column for unit in keep for column in range(size)]


def best(weight: Tensor, gram: Tensor, keep: list[int], size: int, damping: float) -> tuple[float, Tensor]:
    """(cost, weights) of the columns kept: the least of tr(D H D^T) by least squares on the root of the damped Hessian, as far
    from the formula of the code as can be."""
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    root = torch.linalg.cholesky(hessian).t()  # H = R^T R
    columns = spread(keep, size)
    found = torch.linalg.lstsq(root[:, columns], root @ weight.double().t()).solution.t()
    whole = torch.zeros_like(weight, dtype=torch.float64)
    whole[:, columns] = found
    return float(((whole - weight) @ root.t()).square().sum()), found


def greedy(weight: Tensor, gram: Tensor, size: int, damping: float, least: int) -> list[int]:
    """Every unit tried at every step."""
    left, order = list(range(weight.shape[1] // size)), []
    while len(left) > least:
        gone = min(left, key=lambda unit: best(weight, gram, [u for u in left if u != unit], size, damping)[0])
        left.remove(gone)
        order.append(gone)
    return order


SHAPES = [(5, 12, 1), (3, 6, 4), (7, 5, 3), (2, 9, 2)]


@pytest.mark.parametrize(("out", "units", "size"), SHAPES)
@pytest.mark.parametrize("least", [0, 1, 3])
def test_every_step_removes_what_costs_least_of_all_that_could_go(out: int, units: int, size: int, least: int) -> None:
    weight, _, gram = case(out, units, size)
    found = ordered(weight, gram, size, 0.01, least)
    assert found.order == greedy(weight, gram, size, 0.01, max(least, 1)) + (found.order[-1:] if least == 0 else [])
    assert len(found.errors) == units - least + 1
    assert sorted(set(found.order)) == sorted(found.order)
    assert least or found.errors[-1] == pytest.approx(1)


@pytest.mark.parametrize(("out", "units", "size"), SHAPES)
def test_errors_are_those_of_the_outputs_on_the_very_inputs(out: int, units: int, size: int) -> None:
    weight, inputs, gram = case(out, units, size)
    found = ordered(weight, gram, size, 0.05)
    assert found.errors[0] == 0
    for number in range(1, units):
        keep = sorted(set(range(units)) - set(found.order[:number]))
        made = best(weight, gram, keep, size, 0.05)[1]
        answers, wanted = inputs[:, spread(keep, size)] @ made.t(), inputs @ weight.double().t()
        assert found.errors[number] == pytest.approx(float((answers - wanted).norm() / wanted.norm()), rel=1e-9)


@pytest.mark.parametrize(("out", "units", "size"), SHAPES)
def test_restored_is_the_closed_form_that_the_updates_end_at(out: int, units: int, size: int) -> None:
    weight, _, gram = case(out, units, size)
    left = _Left(weight, inverse(gram, 0.01, "x"), size)
    left.remove(2)
    left.remove(1)  # written back in between
    keep = left.units.tolist()
    torch.testing.assert_close(left.weights.t(), best(weight, gram, keep, size, 0.01)[1], rtol=1e-9, atol=1e-9)
    made = restored(weight, gram, keep, size, 0.01)
    torch.testing.assert_close(made, left.weights.t().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(restored(weight, gram, list(range(units)), size, 0.01), weight, rtol=1e-5, atol=1e-5)


def test_two_at_once_are_the_best_pair_where_columns_do_not_meet() -> None:
    """Brute force over all subsets: without correlations greedy is the best there is, and its cost is |w_j|^2 H_jj."""
    gram = torch.diag(torch.tensor([3.0, 0.5, 2.0, 1.0, 4.0, 0.7], dtype=torch.float64))
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    found = ordered(weight, gram, 1, 0.01)
    subsets = itertools.combinations(range(6), 4)
    keep = min(subsets, key=lambda keep: best(weight, gram, list(keep), 1, 0.01)[0])
    assert set(range(6)) - set(keep) == set(found.order[:2])
    cost = (weight.double() ** 2).sum(0) * gram.diagonal()
    assert found.order == cost.argsort().tolist()[:5]
    assert found.errors[2] == pytest.approx(float(cost.sort().values[:2].sum() / cost.sum()) ** 0.5)


def test_many_columns_go_batch_after_batch() -> None:
    """More than are written back at once, against one at a time."""
    weight, _, gram = case(6, 3 * COLUMNS + 10, 1, seed=3)
    found = ordered(weight, gram, 1, 0.01)
    left, order, whole = _Left(weight, inverse(gram, 0.01, "x"), 1), [], float(((weight @ gram.float()) * weight).sum())
    for number in range(1, len(found.errors)):
        unit, lost = left.remove(1)[0]
        order.append(unit)
        assert found.errors[number] == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert found.order == order
    keep = sorted(set(range(3 * COLUMNS + 10)) - set(order[: 2 * COLUMNS]))
    made = torch.zeros_like(weight)
    made[:, keep] = restored(weight, gram, keep, 1, 0.01)
    assert relative(made - weight, weight, gram) == pytest.approx(found.errors[2 * COLUMNS], rel=1e-4)


def test_a_sum_of_others_costs_next_to_nothing_and_dead_inputs_nothing() -> None:
    inputs = inputs_of(8, 50)
    inputs[:, 3] = inputs[:, 0] + inputs[:, 6]
    inputs[:, 5] = 0
    gram = inputs.t() @ inputs / 50
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)) * 10
    found = ordered(weight, gram, 1, 1e-6)
    assert found.order[0] == 5
    assert found.order[1] in (0, 3, 6)
    assert found.errors[1] == 0
    assert found.errors[2] < 1e-4 < found.errors[3]
    kept = [0, 3, 5, 6]
    assert torch.equal(restored(weight, gram, kept, 1, 0.01)[:, 2], weight[:, 5])  # for texts in which it does live
    dead = ordered(weight, torch.zeros(8, 8, dtype=torch.float64), 2, 0.01)
    assert dead.order == [0, 1, 2]
    assert dead.errors == [0, 0, 0, 0]


def test_a_bias_takes_the_mean_error() -> None:
    """Covariance and shifted bias together are least squares with an intercept."""
    inputs = inputs_of(6, 80, shift=5.0)
    weight, bias, keep = torch.randn(3, 6, generator=torch.Generator().manual_seed(4)), torch.zeros(3), [0, 2, 3]
    state = Moments(torch.zeros(6, 6).double(), torch.zeros(6).double())
    state.add(inputs[:50])
    state.add(inputs[50:])
    made = torch.zeros_like(weight)
    made[:, keep] = restored(weight, state.centred("x"), keep, 1, 1e-9)
    found = bias + shifted(weight, made, state.mean)
    wanted = inputs @ weight.double().t()
    with_one = torch.cat([inputs[:, keep], torch.ones(80, 1, dtype=torch.float64)], 1)
    least = torch.linalg.lstsq(with_one, wanted).solution
    torch.testing.assert_close(torch.cat([made[:, keep], found[:, None]], 1).double().t(), least, rtol=1e-4, atol=1e-4)
    answers = inputs @ made.double().t() + found
    torch.testing.assert_close((answers - wanted).mean(0), torch.zeros(3).double(), rtol=0, atol=1e-5)
    assert relative(made - weight, weight, state.centred("x")) == pytest.approx(
        float((answers - wanted).norm() / (wanted - wanted.mean(0)).norm()), rel=1e-4
    )
    assert float((answers - wanted).norm()) < float((inputs @ (made - weight).double().t()).norm())


def test_an_input_that_never_changes_is_dead_where_a_bias_takes_it() -> None:
    inputs = torch.randn(60, 4, generator=torch.Generator().manual_seed(5))
    inputs[:, 1] = 7.3
    state = Moments(torch.zeros(4, 4).double(), torch.zeros(4).double())
    state.add(inputs)
    weight = torch.ones(2, 4)
    assert ordered(weight, state.centred("x"), 1, 0.01).order[0] == 1
    assert ordered(weight, state.gram("x"), 1, 0.01).order[-1] != 1  # without a bias it is the one that counts most


def test_scores_follow_the_order() -> None:
    weight, _, gram = case(5, 9, 1)
    found = ordered(weight, gram, 1, 0.01, least=2)
    scores = score_of(found, 9)
    assert scores.argsort(stable=True).tolist()[:7] == found.order
    assert torch.isinf(scores).sum() == 2
    assert scores[found.order].tolist() == pytest.approx(found.errors[1:])
    assert score_of(Ordered([2, 0, 1], [0.0, 0.0, 0.3, 0.2]), 4).argsort().tolist() == [2, 0, 1, 3]
    group = Group("encoder", 0)
    for share in (0.2, 0.5, 0.7):
        stay = structured.select({group: scores}, share, "layer")[group]
        assert set(range(9)) - set(stay) == set(found.order[: 9 - len(stay)])


# on models


def slow_inputs(bundle: Bundle, examples: Examples, module: nn.Module) -> Tensor:
    """[tokens, in] float64 of what `module` reads when the whole model runs text by text."""
    found: list[Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().flatten(0, -2)))
    block_outputs(bundle, examples)
    hook.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_every_group_of_a_model_is_ordered_by_what_the_model_gives_it(tiny: Tiny, family: str) -> None:
    bundle = opened(tiny, family)
    examples = texts(bundle)
    found = observed(bundle, examples, "heads+neurons", 0.01)
    assert found.keys() == {**groups(bundle, "heads"), **groups(bundle, "neurons")}.keys()
    for group in list(found)[:: max(1, len(found) // 4)]:
        ((linear, size),) = readers(bundle, group)
        weight, inputs = surgery.weight_2d(linear).detach(), slow_inputs(bundle, examples, linear)
        if getattr(linear, "bias", None) is not None:
            inputs = inputs - inputs.mean(0)
        slow = ordered(weight, inputs.t() @ inputs / len(inputs), size, 0.01)
        assert found[group].order[:2] == slow.order[:2]
        assert found[group].errors == pytest.approx(slow.errors, rel=1e-2, abs=1e-5)  # ties may fall either way


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_what_stays_makes_up_block_after_block(tiny: Tiny, family: str) -> None:
    """Nearer to the whole model than by leaving out the same units, and cutting what was zeroed changes no answer."""
    bundle = opened(tiny, family)
    floats, plain, examples = bundle.copy(), bundle.copy(), texts(bundle)
    found = observed(bundle, examples, "heads+neurons", 0.01)
    keep = {
        group: sorted(set(range(units)) - set(found[group].order[: units // 2]))
        for part in ("heads", "neurons")
        for group, units in groups(bundle, part).items()
    }
    told = make_up(bundle, examples, keep, 0.01)
    assert set(told) == {str(group) for group in keep}
    gone = {
        group: torch.ones(groups(plain, "heads" if group.attention is not None else "neurons")[group]).bool()
        for group in keep
    }
    for group, stay in keep.items():
        gone[group][stay] = False
    structured.silence(plain, gone)
    errors = [block_errors(floats, made, examples) for made in (bundle, plain)]
    assert errors[0][0] < errors[1][0]
    assert sum(errors[0]) < sum(errors[1])
    zeroed = block_outputs(bundle, examples)
    for part in ("heads", "neurons"):
        structured.cut(bundle, part, {group: stay for group, stay in keep.items() if group in groups(floats, part)})
    for cut, whole in zip(block_outputs(bundle, examples), zeroed, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-4)


def test_making_up_is_the_closed_form_on_what_the_pruned_model_gives(tiny: Tiny) -> None:
    bundle = opened(tiny, "bert")
    floats, examples = bundle.copy(), texts(bundle)
    keep = {group: list(range(0, units, 2)) for group, units in groups(bundle, "neurons").items()}
    make_up(bundle, examples, keep, 0.01)
    for group, stay in keep.items():
        ((linear, _),), ((whole, _),) = readers(bundle, group), readers(floats, group)
        inputs = slow_inputs(bundle, examples, linear)  # changed by the blocks before
        mean = inputs.mean(0)
        gram = (inputs - mean).t() @ (inputs - mean) / len(inputs)
        wanted = torch.zeros_like(whole.weight)
        wanted[:, stay] = restored(whole.weight.detach(), gram, stay, 1, 0.01)
        torch.testing.assert_close(linear.weight, wanted, rtol=1e-2, atol=1e-3)
        bias = whole.bias + ((whole.weight - linear.weight).double() @ mean).float()
        torch.testing.assert_close(linear.bias, bias, rtol=1e-3, atol=1e-3)


def test_bad_input_is_named(tiny: Tiny) -> None:
    bundle = opened(tiny, "bert")
    with pytest.raises(StepError, match="texts to calibrate on"):
        observed(bundle, texts(bundle).take([]), "heads", 0.01)
    with torch.no_grad():
        bundle.model.encoder.layer[1].attention.self.value.bias[3] = float("nan")
    with pytest.raises(
        StepError, match=r"finite activations into encoder\.layer\.1\.attention\.output\.dense, got NaN"
    ):
        observed(bundle, texts(bundle), "heads", 0.01)
    wrong = torch.tensor([[1.0, 20.0], [20.0, 1.0]], dtype=torch.float64)
    with pytest.raises(
        StepError, match=r"positive definite Hessian of the inputs of layer\.down, got none up to damping 10;"
    ):
        ordered(torch.ones(2, 2), wrong, 1, 0.01, name="layer.down")
    with pytest.raises(StepError, match=r"positive definite Hessian of the inputs of layer\.down"):
        restored(torch.ones(2, 2), wrong, [0, 1], 1, 0.01, name="layer.down")
