"""The step's other ways reach the parts that do them: weights by what flows into them, tokens, shapes learned in training."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import torch

from flyweight.artifact import Measurement
from flyweight.context import Context
from flyweight.data import Columns
from flyweight.errors import StepError
from flyweight.measure import costs as costing
from flyweight.methods.prune import learned, masks, prune, wished
from flyweight.methods.prune.layers import greedy
from flyweight.methods.prune.restore import texts
from flyweight.methods.prune.scores import groups
from flyweight.methods.prune.sparsegpt import sparsegpt
from flyweight.methods.prune.wanda import wanda
from flyweight.models import surgery
from flyweight.settings import PruneSettings
from flyweight.tasks import task_named
from flyweight.training import predict
from training_cases import examples, open_bundle

LABELS = ("negative", "positive")


@pytest.fixture
def bundle(tiny):
    return open_bundle(tiny("bert", labels=LABELS))


@pytest.fixture
def context(tmp_path, bundle):
    reference = bundle.copy()
    return Context(
        task=task_named("text-classification"),
        seed=3,
        work=tmp_path / "work",
        reference=lambda: reference,
        load=lambda _: reference,
        train=examples(48),
        validation=examples(16, seed=9),
        columns=Columns(),
        device="cpu",
    )


# weights


@pytest.mark.parametrize("criterion", ["hessian", "wanda"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:8"])
def test_weights_by_what_flows_into_them(tiny, bundle, context, criterion, pattern):
    share = {"unstructured": 0.5, "2:4": 0.5, "1:8": 0.875}[pattern]
    given = PruneSettings(
        amount=0.5 if pattern == "unstructured" else None, pattern=pattern, criterion=criterion, samples=24
    )
    plain = open_bundle(tiny("bert", labels=LABELS))
    names = [f"{name}.weight" for name in surgery.linears(plain.model, plain.family)]
    way = wanda if criterion == "wanda" else sparsegpt
    way(plain, texts(given, context), names, share=given.amount, pattern=pattern)
    prune(bundle, given, context)
    for name, view in masks.views(bundle, names).items():
        assert torch.equal(view, masks.views(plain, [name])[name]), name
        assert float((view == 0).float().mean()) == pytest.approx(share, abs=1e-3), name
        if pattern == "1:8":
            assert masks.is_n_of_m(view, 1, 8)
    assert bundle.sparse == dict.fromkeys(names, "2:4" if pattern == "2:4" else "unstructured")
    assert ("output_error" in context.notes) == (criterion == "hessian")
    json.dumps(context.notes)


def test_skipped_weights_stay_whole(bundle, context):
    prune(bundle, PruneSettings(amount=0.5, criterion="wanda", skip=("*.layer.0.*",), samples=24), context)
    assert len(bundle.sparse) == 18
    assert bool((bundle.model.bert.encoder.layer[0].output.dense.weight != 0).all())


@pytest.mark.parametrize("criterion", ["hessian", "wanda"])
def test_weights_need_texts_to_look_at(bundle, context, criterion):
    context.train = None
    with pytest.raises(StepError, match="texts to calibrate on, got none"):
        prune(bundle, PruneSettings(amount=0.5, criterion=criterion), context)


# tokens


def test_tokens_go_and_the_step_gives_back_the_new_tokenizer(bundle, context):
    before = len(bundle.tokenizer)
    used = set(context.train.ids.tolist())
    made = prune(bundle, PruneSettings(target="vocabulary"), context)
    assert len(used) <= len(made.tokenizer) < before
    assert made.model.get_input_embeddings().weight.shape[0] == len(made.tokenizer)
    assert context.notes["tokens_after"] == len(made.tokenizer)
    json.dumps(context.notes)


# layers


def test_layers_by_how_far_they_turn_the_states(bundle, context):
    """The third does nothing at all."""
    silence(bundle.model.bert.encoder.layer[2])
    before = predict(bundle, context.validation)
    prune(bundle, PruneSettings(target="layers", amount=0.25, criterion="cosine", samples=16), context)
    assert context.notes["removed"] == {"encoder": [2]}
    assert context.notes["scores"]["encoder"][2] < 0.1 * min(context.notes["scores"]["encoder"][:2])
    assert np.abs(predict(bundle, context.validation) - before).max() < 0.1
    json.dumps(context.notes)


def silence(block):
    """What it adds to the residual stream is next to nothing, and its norms pass on what is normed already."""
    with torch.no_grad():
        for linear in (block.attention.output.dense, block.output.dense):
            linear.weight.mul_(1e-4)
            linear.bias.zero_()
        for norm in (block.attention.output.LayerNorm, block.output.LayerNorm):
            norm.weight.fill_(1)
            norm.bias.zero_()


@pytest.mark.parametrize("labels", [True, False])
def test_layers_by_what_is_lost_without_them(tiny, bundle, context, labels):
    if not labels:
        context.validation, context.train = None, examples(24, labels=False)
    some = context.validation if labels else context.train
    scores, order = greedy(open_bundle(tiny("bert", labels=LABELS)), some, 0.5)
    prune(bundle, PruneSettings(target="layers", amount=0.5, criterion="loss"), context)
    assert context.notes["removed"] == {"encoder": sorted(one.layer for one in order)}
    assert [one["layer"] for one in context.notes["order"]] == [one.layer for one in order]
    assert context.notes["scores"]["encoder"] == next(iter(scores.values())).tolist()
    json.dumps(context.notes)


@pytest.mark.parametrize("criterion", ["cosine", "loss"])
def test_layers_need_texts_to_look_at(bundle, context, criterion):
    context.train = context.validation = None
    with pytest.raises(StepError, match="texts to calibrate on, got none"):
        prune(bundle, PruneSettings(target="layers", amount=0.5, criterion=criterion), context)


# shapes learned in training


@pytest.mark.parametrize("wish", [{"amount": 0.5}, {"speedup": 1.3, "cost": "flops", "shape": (1, 16)}])
def test_shapes_learned_in_training_are_cut_within_the_wish(bundle, context, wish):
    given = PruneSettings(
        target="heads+neurons", gradual="l0", epochs=6, batch_size=8, learning_rate=1e-3, hidden_weight=1.0, **wish
    )
    assert given.restore == "none"
    before = surgery.shapes(bundle.model, bundle.family)
    flops, weights = costing.flop_costs(bundle, 16).total(before), in_blocks(bundle)
    prune(bundle, given, context)
    after = surgery.shapes(bundle.model, bundle.family)
    assert after != before
    if "amount" in wish:
        assert 0.2 * weights < in_blocks(bundle) <= 0.5 * weights + 1
    else:
        assert costing.flop_costs(bundle, 16).total(after) <= flops / 1.3 * (1 + 1e-6)
    notes = context.notes
    assert notes["price"]["kept"] <= notes["price"]["share"]
    assert sorted(notes["removed_layers"].get("encoder", [])) == sorted(set(range(4)) - set(kept_layers(notes)))
    assert notes["parameters_after"] == sum(p.numel() for p in bundle.model.parameters())
    assert np.isfinite(predict(bundle, context.validation)).all()
    json.dumps(notes)


@pytest.mark.parametrize("earlier", [False, True])
def test_shapes_learned_for_a_wish_in_time_are_raced_against_the_reference(bundle, context, monkeypatch, earlier):
    """The engine's times are FLOPs. Where neurons went before, the budget is what is left of the wish."""
    context.tables, context.threads = context.work / "shared", 2
    whole = flops_of(bundle)
    if earlier:
        prune(bundle, PruneSettings(target="neurons", amount=0.25), context)
    started, seen = flops_of(bundle), []

    class FakeRace:
        def __init__(self, reference, terms, seed=0):
            self.whole = flops_of(reference)
            seen.append((self.whole, terms.threads))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        @contextlib.contextmanager
        def against(self, result):
            value = self.whole / flops_of(result)
            yield lambda rounds: Measurement(
                value=value, low=0.99 * value, high=1.01 * value, n=64, unit="x", method="fake"
            )

    for module in (learned, wished):
        monkeypatch.setattr(module, "Race", FakeRace)
    monkeypatch.setattr(wished, "latency_costs", lambda one, *_: costing.flop_costs(one, 16))
    given = PruneSettings(
        target="heads+neurons", gradual="l0", epochs=6, batch_size=8, learning_rate=1e-3, hidden_weight=1.0, speedup=1.4
    )
    prune(bundle, given, context)
    wish, price = context.notes["wish"], context.notes["price"]
    assert seen == [(whole, 2)] * 2
    assert price["share"] == pytest.approx(whole / 1.4 / started)
    assert price["kept"] <= price["share"]
    assert wish["speedup"] == pytest.approx(whole / flops_of(bundle), abs=1e-3)
    assert wish["speedup"] >= 1.4 * (1 - 1e-6)
    assert wish["met"]
    assert wish["narrow"]
    assert wish.get("start") == (pytest.approx(whole / started, abs=1e-3) if earlier else None)


def flops_of(bundle):
    return costing.flop_costs(bundle, 16).total(surgery.shapes(bundle.model, bundle.family))


def kept_layers(notes):
    return [number for number in range(4) if number not in notes["removed_layers"].get("encoder", [])]


def in_blocks(bundle):
    return sum(
        p.numel() for blocks in surgery.blocks(bundle.model, bundle.family).values() for p in blocks.parameters()
    )


@pytest.mark.parametrize("name", ["bert", "mpnet", "llama"])
def test_prices_are_the_costs_of_what_stays(tiny, name):
    """Of the whole model, and of one without a layer, part by part."""
    bundle = open_bundle(tiny(name, labels=LABELS))
    costs, shapes = costing.flop_costs(bundle, 16), surgery.shapes(bundle.model, bundle.family)
    price = learned.price_of(costs, shapes, costs.base)
    assert price.whole == pytest.approx(costs.total(shapes), rel=1e-5)
    keep = {group: list(range(size)) for group, size in groups(bundle, "heads+neurons").items()}
    keep |= {group: [0, 1, 3] for group in groups(bundle, "layers")}
    for group, stay in keep.items():
        if group.block == 1:
            keep[group] = stay[:1]
    stack = next(iter(shapes))
    small = bundle.copy()
    for group, stay in keep.items():
        if group.block == 1 and group.attention is None:
            surgery.keep_neurons(small.model, small.family, stack, 1, stay)
        elif group.block == 1:
            surgery.keep_heads(small.model, small.family, stack, 1, group.attention, stay)
    surgery.keep_layers(small.model, small.family, {stack: [0, 1, 3]})
    assert price.total(keep) == pytest.approx(
        costing.flop_costs(small, 16).total(surgery.shapes(small.model, small.family)), rel=1e-5
    )
    curve = next(iter(price.parts.values()))
    assert bool((curve[1:] >= curve[:-1]).all())
    assert bool(torch.isfinite(curve).all())


# settings that do not go together


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"amount": 0.5, "criterion": "wanda", "scope": "global"}, "set scope to layer"),
        ({"target": "heads", "amount": 0.5, "gradual": "cubic", "restore": "linear"}, "trains what is left"),
        ({"target": "heads+neurons", "amount": 0.5, "gradual": "l0", "restore": "linear"}, "trains what is left"),
        ({"target": "heads", "amount": 0.5, "gradual": "l0"}, "goes with target heads\\+neurons"),
        ({"target": "heads+neurons", "amount": 0.5, "gradual": "l0", "criterion": "fisher"}, "finds by itself"),
        ({"target": "heads", "amount": 0.5, "speedup": 2.0}, "two wishes"),
        ({"target": "layers", "speedup": 2.0}, "speedup goes with"),
        ({"target": "layers", "amount": 0.5, "restore": "linear"}, "restore linear goes with heads and neurons"),
        ({"target": "neurons", "amount": 0.5, "criterion": "wanda"}, "is none for neurons"),
    ],
)
def test_settings_that_do_not_go_together(values, message):
    with pytest.raises(ValueError, match=message):
        PruneSettings(**values)
