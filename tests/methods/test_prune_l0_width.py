"""Gates of the residual stream: against physical cuts, priced as cut models are counted, and a training that ends narrower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny as tiny_models
from flyweight.artifact import write_manifest
from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.measure.costs import byte_costs, flop_costs
from flyweight.measure.flops import flops
from flyweight.methods.prune import prune, structured
from flyweight.methods.prune.budget import Price, settled
from flyweight.methods.prune.gates import WIDTH, Gates, gated, is_layers, part_of
from flyweight.methods.prune.l0 import L0
from flyweight.methods.prune.learned import _with_width, price_of
from flyweight.methods.prune.scores import Group, groups
from flyweight.models import stream, surgery
from flyweight.models.bundle import Bundle
from flyweight.models.load import load
from flyweight.models.storage import restore, save
from flyweight.settings import PruneSettings
from flyweight.tasks import task_named
from flyweight.training import predict
from training_cases import examples

Tiny = Callable[..., Path]
TASK = task_named("text-classification")


def settings(**values: Any) -> PruneSettings:
    given = {"epochs": 4, "batch_size": 8, "learning_rate": 1e-3, "width": True, **values}
    return PruneSettings(target="heads+neurons", gradual="l0", shape=(1, 16), **given)


def opened(tiny: Tiny, family: str) -> Bundle:
    return load(str(tiny(family, labels=("a", "b"))), TASK)


def sizes_of(bundle: Bundle) -> dict[Group, int]:
    units = {**groups(bundle, "heads"), **groups(bundle, "neurons")}
    parts = {part_of(group): 4 for group in units}
    return {**groups(bundle, "layers"), **units, **parts, WIDTH: stream.width_of(bundle)}


def some_units(bundle: Bundle, seed: int) -> dict[Group, torch.Tensor]:
    """Zeros and ones for every gate, the last of each group open."""
    chance = torch.Generator().manual_seed(seed)
    values = {group: (torch.rand(size, generator=chance) < 0.6).float() for group, size in sizes_of(bundle).items()}
    for value in values.values():
        value[-1] = 1.0
    return values


def kept(values: dict[Group, torch.Tensor]) -> dict[Group, list[int]]:
    keep = {group: value.nonzero()[:, 0].tolist() for group, value in values.items()}
    for group in list(keep):
        if group.block is not None and group.block not in keep[part_of(group)]:
            keep[group] = []
    return keep


def cut(bundle: Bundle, keep: dict[Group, list[int]]) -> None:
    for target in ("heads", "neurons"):
        structured.cut(bundle, target, {group: keep[group] for group in groups(bundle, target)})
    structured.cut(bundle, "layers", {group: stay for group, stay in keep.items() if is_layers(group)})
    stream.keep_dimensions(bundle.model, bundle.family, keep[WIDTH])


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", tiny_models.ENCODERS)
def test_closed_gates_are_a_physical_cut(tiny: Tiny, family: str) -> None:
    bundle, data = opened(tiny, family), examples(12)
    other, whole = bundle.copy(), predict(bundle, data)
    values = some_units(bundle, 2)
    gates = Gates(sizes_of(bundle))
    gates.fix(values)
    with gated(bundle, gates):
        found = predict(bundle, data)
    cut(other, kept(values))
    assert stream.width_of(other) == int(values[WIDTH].sum()) < 32
    same(found, predict(other, data))
    assert abs(found - whole).max() > 1e-2
    assert (predict(bundle, data) == whole).all(), "gates were left behind"


@pytest.mark.parametrize("family", ["bert", "electra"])
def test_settling_leaves_the_answers(tiny: Tiny, family: str) -> None:
    """What gates of dimensions are worth goes into norms, and into the projection at the entry; then they are cut."""
    bundle, data = opened(tiny, family), examples(12)
    gates, price = Gates(sizes_of(bundle)), counted(bundle, settings(speedup=2.0, cost="flops"))
    chance = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group, value in zip(gates.groups, gates.log_alpha, strict=True):
            value.copy_(torch.rand(len(value), generator=chance) * 2 if group == WIDTH else torch.full_like(value, 9.0))
        gates.alpha(WIDTH)[8:16] = -9.0
    objective = L0(
        *(bundle, settings(amount=0.5), (), np.ones(12, dtype=bool), None, "key"),
        teacher=bundle.copy(), gates=gates, price=price, share=float(price.at(24).whole / price.whole), multiple_of=1,
    )  # fmt: skip
    bundle.model.eval()
    whole = predict(bundle, data)
    with gated(bundle, gates):
        before = predict(bundle, data)
        objective._settle()
        same(predict(bundle, data), before)
    assert abs(before - whole).max() > 1e-2
    assert objective.keep is not None
    assert objective.keep[WIDTH] == [*range(8), *range(16, 32)]
    cut(bundle, objective.keep)
    same(predict(bundle, data), before)


def counted(bundle: Bundle, given: PruneSettings) -> Price:
    shapes = surgery.shapes(bundle.model, bundle.family)
    costs = flop_costs(bundle, 16) if given.cost == "flops" else byte_costs(bundle)
    return _with_width(price_of(costs, shapes, costs.base), bundle, given, shapes, costs.base)


@pytest.mark.parametrize("family", tiny_models.ENCODERS)
@pytest.mark.parametrize("cost", ["flops", "bytes"])
def test_a_shape_costs_what_the_cut_model_does(tiny: Tiny, family: str, cost: str) -> None:
    bundle = opened(tiny, family)
    price = counted(bundle, settings(speedup=2.0, cost=cost))
    values = some_units(bundle, 3)
    keep = kept(values)
    if family == "mpnet" and cost == "bytes":  # a shared table of positions loses columns that no block needs
        keep = {
            group: list(range(4)) if group.attention == 0 and group.block is not None else stay
            for group, stay in keep.items()
        }
        values |= {group: torch.ones(4) for group in values if group.attention == 0}
    expected = price.expected({group: value.double() for group, value in values.items()})
    cut(bundle, keep)
    real = flops(bundle, 16) if cost == "flops" else 4 * sum(p.numel() for p in bundle.model.parameters())
    assert price.total(keep) == pytest.approx(real, rel=1e-5)
    assert float(expected) == pytest.approx(real, rel=1e-5)


def test_a_budget_pulls_at_the_width(tiny: Tiny) -> None:
    bundle = opened(tiny, "bert")
    price = counted(bundle, settings(speedup=2.0, cost="flops"))
    shares = {group: torch.full((size,), 1.0, dtype=torch.float64) for group, size in sizes_of(bundle).items()}
    shares[WIDTH] = torch.full((32,), 0.5, dtype=torch.float64, requires_grad=True)
    price.expected(shares).backward()
    assert shares[WIDTH].grad is not None
    assert price.narrow is not None
    each = (price.whole - price.narrow.whole) / 31
    assert shares[WIDTH].grad.tolist() == pytest.approx([each] * 32, rel=1e-5)
    assert each > 0.02 * price.whole


def test_times_go_with_the_width(tiny: Tiny) -> None:
    bundle = opened(tiny, "bert")
    shapes = surgery.shapes(bundle.model, bundle.family)
    plain = price_of(flop_costs(bundle, 16), shapes, base=7.0)
    price = _with_width(plain, bundle, settings(speedup=2.0, cost="latency"), shapes, 7.0)
    half = price.at(16)
    assert half.base == 7.0
    for group, curve in half.parts.items():
        torch.testing.assert_close(curve, plain.parts[group] / 2)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_what_is_settled_is_within_the_budget(tiny: Tiny, share: float) -> None:
    bundle = opened(tiny, "bert")
    gates, price = Gates(sizes_of(bundle)), counted(bundle, settings(speedup=2.0, cost="flops"))
    chance = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in gates.log_alpha:
            value.copy_(torch.randn(len(value), generator=chance) * 3)
    keep = settled(gates, price, share * price.whole)
    assert price.total(keep) <= share * price.whole
    stay, likelihood = keep[WIDTH], gates.alpha(WIDTH).detach()
    assert len(stay) % 8 == 0
    assert 8 <= len(stay) <= 32
    assert min(likelihood[stay]) >= max([likelihood[n] for n in range(32) if n not in stay], default=-99)
    with pytest.raises(ValueError, match="no shape within the budget"):
        settled(gates, price, 1.0)


def context(folder: Path, reference: Bundle, **values: Any) -> Context:
    return Context(
        task=TASK, seed=0, work=folder, train=examples(120, 1), validation=examples(60, 2),
        reference=reference.copy, load=None, **values,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_training_ends_in_a_narrower_model(
    tiny: Tiny, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flyweight.methods.prune.l0.GATE_RATE", 0.5)  # sixty steps have to do
    bundle = opened(tiny, family)
    before = flops(bundle, 16)
    task = context(tmp_path, bundle)
    prune(bundle, settings(speedup=6.0, cost="flops"), task)
    width = task.notes["width"]
    assert width == {"of": 32, "kept": stream.width_of(bundle), "priced": "counted"}
    assert width["kept"] < 32
    assert before / flops(bundle, 16) >= 6.0 * (1 - 1e-6)
    held = task.validation
    assert held is not None
    judged = TASK.metrics(predict(bundle, held), held)[TASK.metric]
    assert judged == pytest.approx(task.notes["training"]["best_metric"]), "what was cut is not what was trained"
    write_manifest(tmp_path / "saved", save(bundle, tmp_path / "saved"))
    assert (predict(restore(tmp_path / "saved"), held) == predict(bundle, held)).all()


def test_a_wish_counts_with_the_width_that_may_go(tiny: Tiny, tmp_path: Path) -> None:
    """Of one head and one neuron at full width are left 1/3.1 of the bytes, in 8 dimensions much less."""
    bundle = opened(tiny, "roberta")
    whole = 4 * sum(parameter.numel() for parameter in bundle.model.parameters())
    task = context(tmp_path, bundle)
    with pytest.raises(StepError, match="one head and 1 neuron in 8 dimensions meets, at most") as refused:
        prune(bundle.copy(), settings(speedup=40.0, cost="bytes"), task)
    most = float(str(refused.value).split("at most ")[1].split(",")[0])
    assert most > 8
    with pytest.raises(StepError, match="in 8 dimensions meets"):
        prune(bundle.copy(), settings(speedup=most + 0.01, cost="bytes"), task)
    prune(bundle, settings(speedup=most, cost="bytes", max_steps=4), task)
    assert whole / (4 * sum(parameter.numel() for parameter in bundle.model.parameters())) >= most
    assert task.notes["width"]["kept"] == 8


def test_where_the_width_cannot_go_it_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    llama = opened(tiny, "llama")
    with pytest.raises(StepError, match="an encoder for width, got 'llama'; leave out width"):
        prune(llama, settings(amount=0.5), context(tmp_path, llama))
    vectors = load(str(tiny("bert")), task_named("embedding"))
    task = Context(
        task=task_named("embedding"), seed=0, work=tmp_path, train=examples(20, labels=False), validation=None,
        reference=vectors.copy, load=None,  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(
        StepError, match="got embedding, whose answers are the hidden states themselves; leave out width"
    ):
        prune(vectors, settings(amount=0.5), task)
    with pytest.raises(ValueError, match="width goes with gradual l0"):
        PruneSettings(target="heads", amount=0.5, width=True)
