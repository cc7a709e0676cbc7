"""Gates against chance and physical cuts, the budget against brute force, and a training that ends in the shape it was asked for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flyweight.context import Context, NoProgress
from flyweight.errors import StepError
from flyweight.measure.costs import byte_costs
from flyweight.methods.prune import learned, structured
from flyweight.methods.prune.budget import Price, settled
from flyweight.methods.prune.gates import Gates, gated, is_layers, is_part, likely, open_share, part_of, sample
from flyweight.methods.prune.l0 import L0, SETTLE, _with_hidden_weight, learn_shape, matched
from flyweight.methods.prune.scores import Group, groups
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.models.load import load
from flyweight.settings import PruneSettings
from flyweight.tasks import task_named
from flyweight.training import predict
from training_cases import examples, weights_hash

Tiny = Callable[..., Path]
SETTINGS = PruneSettings(
    target="heads+neurons", gradual="l0", speedup=2.0, epochs=6, batch_size=8, learning_rate=1e-3, hidden_weight=1.0
)


def parts_of(bundle: Bundle) -> dict[Group, int]:
    """Gates of layers, of heads and neurons, and of the parts that these make, in every block that has them."""
    units = {**groups(bundle, "heads"), **groups(bundle, "neurons")}
    (depth,) = groups(bundle, "layers").values()
    whole = {} if bundle.family.model_type == "gpt2" else {part_of(group): depth for group in units}
    return {**groups(bundle, "layers"), **units, **whole}


def price_of(bundle: Bundle, base: float = 5.0) -> Price:
    """Heads at 3 each, neurons at 1/4, and something for every part that is there at all."""
    sizes = {**groups(bundle, "heads"), **groups(bundle, "neurons")}
    each = {group: 0.25 if group.attention is None else 3.0 for group in sizes}
    return Price(base, {group: 2.0 + each[group] * torch.arange(size + 1.0) for group, size in sizes.items()})


@pytest.mark.parametrize("family", ["bert", "mpnet", "distilbert"])
def test_blocks_that_lost_parts_are_priced_as_they_are(tiny: Tiny, family: str) -> None:
    """The first has no attention, the second no feed-forward part, the third neither."""
    bundle = opened(tiny, family)
    gone = [(0, 0), (1, None), (2, 0), (2, None)]
    structured.cut(bundle, "heads+neurons", {Group("encoder", block, attention): [] for block, attention in gone})
    costs, shapes = byte_costs(bundle), surgery.shapes(bundle.model, bundle.family)
    price = learned.price_of(costs, shapes, costs.base)
    assert price.whole == pytest.approx(costs.total(shapes), rel=1e-6)
    few = {group: list(range(2)) for group in price.parts}
    structured.cut(bundle, "heads+neurons", few)
    layers = {Group("encoder"): [0, 1, 2]}
    structured.cut(bundle, "layers", layers)
    real = 4 * sum(parameter.numel() for parameter in bundle.model.parameters())
    shared = 0 if family != "mpnet" else costs.total(surgery.shapes(bundle.model, bundle.family)) - real
    assert price.total({**few, **layers}) == pytest.approx(real + shared, rel=1e-6)


def test_a_gate_is_as_often_open_as_it_says() -> None:
    log_alpha = torch.tensor([-3.0, -0.5, 0.0, 2.0])
    uniform = torch.rand(200_000, 4, generator=torch.Generator().manual_seed(0))
    drawn = sample(log_alpha, uniform)
    torch.testing.assert_close((drawn > 0).float().mean(0), open_share(log_alpha), atol=0.004, rtol=0)
    assert (drawn == 0).any()
    assert (drawn == 1).any()
    # by hand: sigmoid(0 - 2/3 ln(.1 / 1.1)) = sigmoid(1.5986) and 1.2 sigmoid(0) - .1
    assert float(open_share(torch.zeros(1))) == pytest.approx(0.8318, abs=1e-4)
    assert float(likely(torch.zeros(1))) == pytest.approx(0.5)
    assert likely(torch.tensor([-9.0, 9.0])).tolist() == [0.0, 1.0]


def test_gates_learn_what_they_should() -> None:
    """The gradient of the mean gate by differences of the mean itself, on the same draws."""
    uniform = torch.rand(50_000, generator=torch.Generator().manual_seed(1))
    log_alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    sample(log_alpha, uniform.double()).mean().backward()
    step = 1e-4
    with torch.no_grad():
        up, down = (sample(log_alpha + sign * step, uniform.double()).mean() for sign in (1, -1))
    assert log_alpha.grad is not None
    assert float(log_alpha.grad) == pytest.approx(float((up - down) / (2 * step)), rel=1e-3)


@pytest.mark.parametrize("family", ["bert", "mpnet", "distilbert", "gpt2", "llama"])
def test_closed_gates_are_a_physical_cut(tiny: Tiny, family: str) -> None:
    bundle = load(str(tiny(family)), task_named("embedding"))
    bundle.model.eval()
    other = bundle.copy()
    gates = Gates(parts_of(bundle))
    chance = torch.Generator().manual_seed(2)
    values = {group: (torch.rand(size, generator=chance) < 0.5).float() for group, size in parts_of(bundle).items()}
    for value in values.values():
        value[-1] = 1.0
    gates.fix(values)
    data = examples(12, labels=False)
    whole = predict(bundle, data)
    with gated(bundle, gates):
        found = predict(bundle, data)
    keep = {group: value.nonzero()[:, 0].tolist() for group, value in values.items()}
    for group in list(keep):
        if group.block is not None and group.block not in keep.get(part_of(group), [group.block]):
            keep[group] = []
    assert family == "gpt2" or any(not stay for stay in keep.values())
    for target in ("heads", "neurons"):
        structured.cut(other, target, {group: keep[group] for group in groups(bundle, target)})
    structured.cut(other, "layers", {group: stay for group, stay in keep.items() if is_layers(group)})
    torch.testing.assert_close(torch.tensor(found), torch.tensor(predict(other, data)), rtol=1e-4, atol=1e-5)
    assert abs(found - whole).max() > 1e-3, "the gates do nothing"
    assert (predict(bundle, data) == whole).all(), "gates were left behind"


def test_open_gates_change_nothing(tiny: Tiny) -> None:
    bundle = load(str(tiny("bert")), task_named("embedding"))
    gates, data = Gates(parts_of(bundle)), examples(6, labels=False)
    gates.fix({group: torch.ones(size) for group, size in parts_of(bundle).items()})
    bundle.model.eval()
    whole = predict(bundle, data)
    with gated(bundle, gates):
        torch.testing.assert_close(torch.tensor(predict(bundle, data)), torch.tensor(whole), rtol=1e-6, atol=1e-6)


def test_expected_cost_at_certain_gates_is_the_cost(tiny: Tiny) -> None:
    bundle = load(str(tiny("bert")), task_named("embedding"))
    price, sizes = price_of(bundle), parts_of(bundle)
    chance = torch.Generator().manual_seed(3)
    shares = {group: (torch.rand(size, generator=chance) < 0.6).double() for group, size in sizes.items()}
    shares[part_of(Group("encoder", 0))][0] = shares[part_of(Group("encoder", 0, 0))][3] = 0.0
    keep = {group: share.nonzero()[:, 0].tolist() for group, share in shares.items()}
    layers = keep[next(group for group in sizes if is_layers(group))]
    for group in keep:
        if group.block is not None and group.block not in keep[part_of(group)]:
            keep[group] = []
    assert any(not stay for stay in keep.values())
    by_hand = 5.0 + sum(
        2 + (0.25 if group.attention is None else 3.0) * len(stay)
        for group, stay in keep.items()
        if group.block is not None and group.block in layers
    )
    assert price.total(keep) == pytest.approx(by_hand)
    assert float(price.expected(shares)) == pytest.approx(by_hand)
    ones = {group: torch.ones(size) for group, size in sizes.items()}
    assert float(price.expected(ones)) == pytest.approx(price.whole)


def test_expected_cost_has_the_gradient_of_its_curves() -> None:
    group, layers = Group("encoder", 0, 0), Group("encoder")
    price = Price(1.0, {group: torch.tensor([0.0, 1.0, 5.0, 6.0])})
    heads = torch.tensor([0.5, 0.7, 0.4], requires_grad=True)  # 1.6 of 3
    alive = torch.tensor([0.5], requires_grad=True)
    cost = price.expected({layers: alive, group: heads})
    cost.backward()
    assert float(cost.detach()) == pytest.approx(1 + 0.5 * (1 + 0.6 * 4))
    assert heads.grad is not None
    assert alive.grad is not None
    assert heads.grad.tolist() == pytest.approx([2.0] * 3)
    assert alive.grad.tolist() == pytest.approx([3.4])
    part = torch.tensor([0.25], requires_grad=True)
    curve = torch.tensor([0.5, 1.0, 5.0, 6.0])  # a block without heads still costs something
    cost = Price(1.0, {group: curve}).expected({layers: alive, group: heads, part_of(group): part})
    heads.grad = alive.grad = None
    cost.backward()
    assert float(cost.detach()) == pytest.approx(1 + 0.5 * (0.5 + 0.25 * (3.4 - 0.5)))
    assert part.grad is not None
    assert heads.grad.tolist() == pytest.approx([0.5 * 0.25 * 4] * 3)
    assert alive.grad.tolist() == pytest.approx([0.5 + 0.25 * 2.9])
    assert part.grad.tolist() == pytest.approx([0.5 * 2.9])


@pytest.mark.parametrize("seed", range(5))
def test_layers_are_matched_in_order_at_the_least_sum(seed: int) -> None:
    errors = torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))
    best = min(
        itertools.combinations_with_replacement(range(5), 4),
        key=lambda chosen: float(sum(errors[t, s] for t, s in enumerate(chosen))),
    )
    assert matched(errors) == list(best)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("multiple", [1, 8])
def test_what_is_settled_is_within_the_budget_and_fills_it(tiny: Tiny, share: float, multiple: int) -> None:
    bundle = load(str(tiny("bert")), task_named("embedding"))
    gates, price = Gates(parts_of(bundle)), price_of(bundle)
    chance = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in gates.log_alpha:
            value.copy_(torch.randn(len(value), generator=chance) * 3)
    budget = share * price.whole
    keep = settled(gates, price, budget, multiple)
    assert price.total(keep) <= budget
    layers = keep[next(group for group in keep if is_layers(group))]
    for group, stay in keep.items():
        gone = group.block is not None and group.block not in keep[part_of(group)]
        if gone:
            assert stay == []
            continue
        likelihood = gates.alpha(group).detach()
        assert stay == sorted(stay)
        assert min(likelihood[stay], default=99) >= max(
            [likelihood[n] for n in range(len(likelihood)) if n not in stay], default=-99
        )
        if group.block is None:
            assert is_part(group) or stay
            continue
        assert len(stay) >= 1
        assert group.attention is not None or len(stay) % multiple == 0
        more = multiple if group.attention is None else 1
        if group.block in layers and len(stay) < len(likelihood):
            curve = price.parts[group]
            assert price.total(keep) + float(curve[len(stay) + more] - curve[len(stay)]) > budget, "room was left"


class Told(NoProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def context(tmp_path: Path, reference: Bundle) -> Context:
    return Context(
        progress=Told(),
        task=task_named("text-classification"), seed=0, work=tmp_path, train=examples(120, 1), validation=examples(60, 2),
        reference=reference.copy, load=None,  # type: ignore[arg-type]
    )  # fmt: skip


def opened(tiny: Tiny, family: str = "bert") -> Bundle:
    return load(str(tiny(family, labels=("a", "b"))), task_named("text-classification"))


def test_training_ends_in_a_shape_within_the_wish(tiny: Tiny, tmp_path: Path) -> None:
    bundle = opened(tiny)
    price = price_of(bundle, base=0.0)
    task = context(tmp_path, bundle)
    keep, notes = learn_shape(bundle, SETTINGS, task, price, 0.5)
    assert isinstance(task.progress, Told)
    assert notes["gates"] > 0.9  # a hundred steps are too few
    assert any("train for more epochs" in note for note in task.progress.notes)
    assert 0.3 * price.whole < price.total(keep) <= 0.5 * price.whole
    candidates = [entry for entry in notes["history"] if entry["step"] >= SETTLE * notes["steps"]]
    assert notes["best_step"] >= SETTLE * notes["steps"]
    assert notes["best_metric"] == max(entry["metric"] for entry in candidates)


@pytest.mark.parametrize("closed", [False, True])
def test_settling_leaves_the_answers(tiny: Tiny, tmp_path: Path, closed: bool) -> None:
    """What gates are worth goes into the weights; what is closed is as good as cut."""
    bundle = opened(tiny)
    gates, price = Gates(parts_of(bundle)), price_of(bundle)
    chance = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group, value in zip(gates.groups, gates.log_alpha, strict=True):
            value.copy_(torch.rand(len(value), generator=chance) * 2)  # worth .5 to .96
            if is_layers(group):
                value.fill_(9.0)
            if is_part(group) and closed:
                value[1] = -9.0
    targets = learned_from(bundle, gates, price, share=1.0)
    bundle.model.eval()
    data, whole = examples(12), predict(bundle, examples(12))
    with gated(bundle, gates):
        before = predict(bundle, data)
        targets._settle()
        after = predict(bundle, data)
    torch.testing.assert_close(torch.tensor(after), torch.tensor(before), rtol=1e-4, atol=1e-5)
    assert abs(before - whole).max() > 1e-2
    assert targets.keep is not None
    assert (targets.keep[Group("encoder", 1, 0)] == []) is closed
    for target in ("heads", "neurons"):
        structured.cut(bundle, target, {group: targets.keep[group] for group in groups(bundle, target)})
    torch.testing.assert_close(torch.tensor(predict(bundle, data)), torch.tensor(before), rtol=1e-4, atol=1e-5)


def learned_from(bundle: Bundle, gates: Gates, price: Price, share: float) -> L0:
    labelled = np.ones(12, dtype=bool)
    return L0(
        *(bundle, SETTINGS, (), labelled, None, "key"),
        teacher=bundle.copy(), gates=gates, price=price, share=share, multiple_of=1,
    )  # fmt: skip


def test_hidden_states_count_unless_they_cannot_be_compared(tiny: Tiny) -> None:
    bert, mpnet, t5 = (
        load(str(tiny(family, labels=("a", "b"))), task_named("text-classification"))
        for family in ("bert", "mpnet", "t5")
    )
    given = SETTINGS.model_dump(exclude_unset=True)
    given.pop("hidden_weight")
    plain = PruneSettings(**given)
    assert _with_hidden_weight(plain, bert, bert.copy()).hidden_weight == 1.0
    assert _with_hidden_weight(plain, bert, mpnet).hidden_weight == 0.0  # which reads other tokens
    assert _with_hidden_weight(plain, t5, t5.copy()).hidden_weight == 0.0
    assert _with_hidden_weight(PruneSettings(**given, hidden_weight=0.0), bert, bert.copy()).hidden_weight == 0.0
    with pytest.raises(StepError, match="one stack of blocks for hidden_weight"):
        _with_hidden_weight(SETTINGS, t5, t5.copy())


@pytest.mark.parametrize("width", [False, True])
def test_a_killed_training_goes_on_to_the_same_end(tiny: Tiny, tmp_path: Path, width: bool) -> None:
    given = SETTINGS.model_copy(update={"width": width})
    whole, half = opened(tiny), opened(tiny)
    price = price_of(whole)
    reference = whole.copy()
    wanted, _ = learn_shape(whole, given, context(tmp_path / "a", reference), price, 0.5)
    for stop in (20, 70):  # before and after the shape is settled
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("flyweight.methods.prune.l0.L0.after_step", _stopping(stop))
            learn_shape(half, given, context(tmp_path / "b", reference), price, 0.5)
        half = opened(tiny)
    steps: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flyweight.methods.prune.l0.L0.after_step", _stopping(0, steps))
        found, _ = learn_shape(half, given, context(tmp_path / "b", reference), price, 0.5)
    assert 20 < steps[0] <= 70, "it began anew"
    assert found == wanted
    assert weights_hash(half.model) == weights_hash(whole.model)


def _stopping(stop: int, seen: list[int] | None = None) -> Any:

    original = L0.after_step

    def after_step(self: Any, step: int, total: int) -> None:
        if seen is not None:
            seen.append(step)
        if step == stop:
            raise KeyboardInterrupt
        original(self, step, total)

    return after_step


def test_a_wish_beyond_the_least_shape_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    bundle = opened(tiny)
    before = weights_hash(bundle.model)
    with pytest.raises(StepError, match="a wish that one layer of one head and 1 neuron meets, at most"):
        learn_shape(bundle, SETTINGS, context(tmp_path, bundle), price_of(bundle, base=1000.0), 0.5)
    assert weights_hash(bundle.model) == before
