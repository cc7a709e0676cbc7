"""Scores of layers, against models from which they were really cut and against single texts without batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from flyweight.data import pack
from flyweight.errors import StepError
from flyweight.methods.prune import layers, structured
from flyweight.methods.prune.scores import Group
from flyweight.models import surgery
from flyweight.training import predict
from tiny import CLASSIFIERS
from training_cases import Notes, examples, open_bundle

LABELS = ("negative", "positive")


def ended(data):
    """T5's head reads the last </s>."""
    texts = [([*data.ids[a:b].tolist(), 1], None) for a, b in itertools.pairwise(data.starts)]
    return pack(texts, data.labels)


def data_for(model_type, count=12, labels=True):
    found = examples(count, labels=labels)
    return ended(found) if model_type == "t5" else found


def opened(tiny, model_type="bert", labels=LABELS, **changes):
    """Layers that differ in what they do: block i of a stack is i + 1 times as loud in its MLP."""
    task = "text-classification" if labels else "embedding"
    bundle = open_bundle(tiny(model_type, labels=labels, **changes), task)
    with torch.no_grad():
        for name, stack in surgery.stacks(bundle.model, bundle.family).items():
            for number, block in enumerate(surgery.blocks(bundle.model, bundle.family)[name]):
                surgery.weight_2d(surgery.mlp_linears(block, stack)[1]).mul_(1 + (number * 2) % 3)
    return bundle


def cut(bundle, gone):
    """A copy without these layers, by surgery."""
    copy = bundle.copy()
    keep = {
        stack: [n for n in range(len(blocks)) if (stack, n) not in gone]
        for stack, blocks in surgery.blocks(bundle.model, bundle.family).items()
    }
    surgery.keep_layers_of(copy, keep)
    return copy


def cross_entropy(logits, labels):
    """Mean of -log softmax, by hand."""
    logits = logits.astype(np.float64)
    norm = np.log(np.exp(logits).sum(-1))
    return float(np.mean(norm - logits[np.arange(len(labels)), labels]))


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_loss_is_that_of_models_that_were_really_cut(tiny, model_type):
    bundle = opened(tiny, model_type)
    data = data_for(model_type)
    whole = cross_entropy(predict(bundle, data), data.labels)
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    found = layers.loss(bundle, data)
    lists = surgery.blocks(bundle.model, bundle.family)
    assert [str(group) for group in found] == list(lists)
    for group, scores in found.items():
        wanted = [
            cross_entropy(predict(cut(bundle, {(group.stack, n)}), data), data.labels) - whole
            for n in range(len(lists[group.stack]))
        ]
        np.testing.assert_allclose(scores.numpy(), wanted, atol=2e-5)
        assert np.ptp(wanted) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())
    assert cross_entropy(predict(bundle, data), data.labels) == whole  # no hook is left


@pytest.mark.parametrize("labels", [None, LABELS])
def test_without_labels_it_is_how_far_the_answers_turn(tiny, labels):
    bundle = opened(tiny, labels=labels)
    data = data_for("bert", labels=False)
    whole = predict(bundle, data).astype(np.float64)
    found = layers.loss(bundle, data)[Group("encoder")]
    for n, score in enumerate(found.tolist()):
        other = predict(cut(bundle, {("encoder", n)}), data).astype(np.float64)
        norms = np.linalg.norm(whole, axis=1) * np.linalg.norm(other, axis=1)
        assert score == pytest.approx(float(np.mean(1 - (whole * other).sum(1) / norms)), abs=1e-5)
        assert score > 1e-4


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_cosine_is_the_mean_over_all_tokens_of_single_texts(tiny, model_type):
    bundle = opened(tiny, model_type)
    data = data_for(model_type, 20)
    bundle.model.train()
    found = layers.cosine(bundle, data)
    assert bundle.model.training
    bundle.model.eval()
    taken = {}

    def keep(place):
        def hook(_, given, named, output):
            before = given[0] if given else named["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            one, other = (x[0].double().numpy() for x in (before, after))
            norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
            taken.setdefault(place, []).extend(1 - (one * other).sum(1) / norms)

        return hook

    lists = surgery.blocks(bundle.model, bundle.family)
    for stack, blocks in lists.items():
        for number, block in enumerate(blocks):
            block.register_forward_hook(keep((stack, number)), with_kwargs=True)
    with torch.no_grad():
        for a, b in itertools.pairwise(data.starts):
            ids = torch.from_numpy(data.ids[a:b].astype(np.int64))[None]
            more = {"decoder_input_ids": ids} if model_type == "t5" else {}
            bundle.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more)
    for group, scores in found.items():
        wanted = [np.mean(taken[group.stack, number]) for number in range(len(lists[group.stack]))]
        assert all(len(taken[group.stack, number]) == len(data.ids) for number in range(len(lists[group.stack])))
        np.testing.assert_allclose(scores.numpy(), wanted, atol=1e-6)
        assert np.ptp(wanted) > 1e-3


def by_hand(bundle, data, count):
    """Cut one after the other for real, every candidate tried."""
    gone, order, whole = set(), [], cross_entropy(predict(bundle, data), data.labels)
    for _ in range(count):
        places = [
            (stack, n)
            for stack, blocks in surgery.blocks(bundle.model, bundle.family).items()
            for n in range(len(blocks))
            if (stack, n) not in gone and sum(name == stack for name, _ in gone) < len(blocks) - 1
        ]
        losses = [cross_entropy(predict(cut(bundle, gone | {place}), data), data.labels) - whole for place in places]
        best = int(np.argmin(losses))
        gone.add(places[best])
        order.append((*places[best], losses[best]))
    return order


def test_greedy_measures_again_after_every_removal(tiny):
    """On this model the layers that harm least one by one are not those that harm least together."""
    data = examples(24)
    differs = False
    for seed in range(3):
        bundle = opened(tiny, num_hidden_layers=5, seed=seed)
        scores, order = layers.greedy(bundle, data, 0.6)
        wanted = by_hand(bundle, data, 3)
        assert [(one.stack, one.layer) for one in order] == [(stack, n) for stack, n, _ in wanted]
        np.testing.assert_allclose([one.harm for one in order], [harm for *_, harm in wanted], atol=2e-5)
        keep = structured.select(scores, 0.6, "layer")[Group("encoder")]
        assert keep == sorted(set(range(5)) - {n for _, n, _ in wanted})
        once = structured.select(layers.loss(bundle, data), 0.6, "layer")[Group("encoder")]
        differs |= once != keep
    assert differs


def test_greedy_over_all_stacks_leaves_each_its_last_layer(tiny):
    bundle = opened(tiny, "t5")
    data = data_for("t5")
    scores, order = layers.greedy(bundle, data, 4 / 6, "global")
    wanted = by_hand(bundle, data, 4)
    assert [(one.stack, one.layer) for one in order] == [(stack, n) for stack, n, _ in wanted]
    keep = structured.select(scores, 4 / 6, "global")
    gone = {(group.stack, n) for group, stay in keep.items() for n in range(3) if n not in stay}
    assert gone == {(stack, n) for stack, n, _ in wanted}
    assert all(keep.values())
    _, order = layers.greedy(bundle, data, 1 / 3, "layer")
    assert sorted(one.stack for one in order) == ["decoder", "encoder"]


def test_a_skipped_layer_hands_on_what_it_is_given(tiny):
    bundle = opened(tiny)
    blocks = bundle.model.bert.encoder.layer
    seen = []
    blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    blocks[2].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with layers.skipped(bundle, [("encoder", 1)]):
        predict(bundle, examples(2))
    assert torch.equal(seen[0], seen[1])
    seen.clear()
    predict(bundle, examples(2))
    assert not torch.equal(seen[0], seen[1])


def test_progress_is_told(tiny):
    notes = Notes()
    bundle = opened(tiny)
    layers.loss(bundle, examples(4), notes)
    layers.cosine(bundle, examples(4), notes)
    layers.greedy(bundle, examples(4), 0.5, progress=notes)
    assert notes.lines == [
        "track layers: loss 0/4",
        "track layers: cosine 0/4",
        "track layers: loss, one after the other 0/2",
    ]


def test_bad_input(tiny):
    bundle = opened(tiny)
    nothing = examples(4).take([])
    for one in (layers.loss, layers.cosine, lambda *given: layers.greedy(*given, 0.5)):
        with pytest.raises(StepError, match="got none; give"):
            one(bundle, nothing)
    with torch.no_grad():
        bundle.model.bert.encoder.layer[2].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(StepError, match="finite answers of the whole model"):
        layers.loss(bundle, examples(4))
    with pytest.raises(StepError, match=r"finite activations after bert.encoder.layer.2"):
        layers.cosine(bundle, examples(4))
