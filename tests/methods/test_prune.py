"""Pruning of whole models: scores against slow references, shapes after cutting, gradual schedule, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flyweight.artifact import QuantizedTensor
from flyweight.context import Context
from flyweight.data import pack
from flyweight.errors import StepError
from flyweight.methods.prune import gradual, prune
from flyweight.methods.prune import scores as scoring
from flyweight.methods.prune.masks import cubic_share, is_two_of_four
from flyweight.models import surgery
from flyweight.models.bundle import Codes
from flyweight.settings import PruneSettings
from flyweight.tasks import task_named
from flyweight.training import predict
from tiny import CLASSIFIERS
from training_cases import examples, open_bundle

LABELS = ("negative", "positive")


@pytest.fixture
def bundle(tiny):
    return open_bundle(tiny("bert", labels=LABELS))


@pytest.fixture
def context(tmp_path):
    def no_reference():
        raise AssertionError

    return Context(
        task=task_named("text-classification"),
        seed=3,
        work=tmp_path / "work",
        reference=no_reference,
        load=no_reference,
        train=examples(48),
        validation=examples(16, seed=9),
        device="cpu",
    )


def settings(**values):
    return PruneSettings(**{"batch_size": 8, "learning_rate": 1e-3, **values})


def ended(data):
    texts = [([*data.ids[a:b].tolist(), 1], None) for a, b in zip(data.starts, data.starts[1:], strict=False)]
    return pack(texts, data.labels)


def zeros(bundle):
    weights = {name: surgery.weight_2d(m) for name, m in surgery.linears(bundle.model, bundle.family).items()}
    return {f"{name}.weight": float((weight == 0).float().mean()) for name, weight in weights.items()}


# scores


def test_magnitude_of_heads_and_neurons_by_hand(bundle):
    """Set weights so that every sum is known: head h of block b holds |w| = (h + 1) in q only, and so on."""
    block = bundle.model.bert.encoder.layer[1]
    attention = block.attention.self
    with torch.no_grad():
        for linear in (attention.query, attention.key, attention.value, block.attention.output.dense):
            linear.weight.zero_()
        for head in range(4):
            attention.query.weight[head * 8, 0] = -(head + 1)  # rows of q
            attention.value.weight[head * 8 + 7, 31] = 10.0  # rows of v
            block.attention.output.dense.weight[5, head * 8 + 3] = 100.0 * head  # columns of o
        block.intermediate.dense.weight.zero_()
        block.output.dense.weight.zero_()
        block.intermediate.dense.weight[2, 3] = -0.5
        block.output.dense.weight[:, 2] = 0.25
    heads = scoring.magnitude(bundle, "heads")
    assert len(heads) == 4
    assert heads[scoring.Group("encoder", 1, 0)].tolist() == [11.0, 112.0, 213.0, 314.0]
    neurons = scoring.magnitude(bundle, "neurons")[scoring.Group("encoder", 1)]
    assert neurons[2] == 0.5 + 32 * 0.25
    assert neurons.sum() == neurons[2]
    layers = scoring.magnitude(bundle, "layers")[scoring.Group("encoder")]
    assert layers[1] == pytest.approx(11 + 112 + 213 + 314 + 8.5)
    assert layers[0] == pytest.approx(
        sum(
            float(m.weight.detach().abs().sum())
            for m in bundle.model.bert.encoder.layer[0].modules()
            if hasattr(m, "in_features")
        ),
        rel=1e-5,
    )


def test_magnitude_of_fused_and_grouped_heads(tiny):
    gpt2 = open_bundle(tiny("gpt2", labels=LABELS))
    weight = gpt2.model.transformer.h[0].attn.c_attn.weight  # [in, q | k | v]
    out = gpt2.model.transformer.h[0].attn.c_proj.weight  # [in, out]
    expected = [
        sum(float(weight.detach()[:, third * 32 + h * 8 : third * 32 + (h + 1) * 8].abs().sum()) for third in range(3))
        + float(out[h * 8 : (h + 1) * 8].abs().sum())
        for h in range(4)
    ]
    found = scoring.magnitude(gpt2, "heads")[scoring.Group("decoder", 0, 0)]
    torch.testing.assert_close(found, torch.tensor(expected))
    llama = open_bundle(tiny("llama", labels=LABELS))
    attention = llama.model.model.layers[2].self_attn
    expected = [
        float(
            attention.q_proj.weight[g * 16 : g * 16 + 16].abs().sum()
            + attention.k_proj.weight[g * 8 : g * 8 + 8].abs().sum()
            + attention.v_proj.weight[g * 8 : g * 8 + 8].abs().sum()
            + attention.o_proj.weight[:, g * 16 : g * 16 + 16].abs().sum()
        )
        for g in range(2)
    ]
    torch.testing.assert_close(
        scoring.magnitude(llama, "heads")[scoring.Group("decoder", 2, 0)], torch.tensor(expected)
    )


@pytest.mark.parametrize("name", ["bert", "mpnet", "gpt2", "llama"])
def test_taylor_is_gradient_times_weight_of_single_examples(tiny, context, name):
    """Slow reference: one backward pass an example, gradient x weight summed over the columns of o or down."""
    bundle = open_bundle(tiny(name, labels=LABELS))
    stack = next(iter(surgery.stacks(bundle.model, bundle.family).values()))
    blocks = surgery.blocks(bundle.model, bundle.family)[stack.name]
    heads = torch.zeros(len(blocks), surgery.layout(blocks[0], stack.attention[0]).units)
    neurons, layers = torch.zeros(len(blocks), 64), torch.zeros(len(blocks))
    context.train = examples(11)
    bundle.model.eval()
    for i in range(11):
        batch = {k: torch.from_numpy(v) for k, v in context.train.batch([i], bundle.encoder.pad).items()}
        logits = bundle.model(**{key: batch[key] for key in bundle.family.inputs}).logits
        label = torch.tensor([int(context.train.labels[i])])
        bundle.model.zero_grad()
        torch.nn.functional.cross_entropy(logits, label).backward()
        for number, block in enumerate(blocks):
            parts = []
            for module, units in (
                (block.get_submodule(stack.attention[0].o), heads.shape[1]),
                (surgery.mlp_linears(block, stack)[1], 64),
            ):
                product = module.weight * module.weight.grad
                product = product.t() if type(module).__name__ == "Conv1D" else product
                parts.append(product.reshape(32, units, -1).sum((0, 2)).detach())
            heads[number] += parts[0].abs()
            neurons[number] += parts[1].abs()
            layers[number] += (parts[0].sum() + parts[1].sum()).abs()
    bundle.model.zero_grad()
    for target, expected in (("heads", heads), ("neurons", neurons), ("layers", layers)):
        found = scoring.taylor(bundle, settings(target=target, amount=0.5, criterion="taylor"), context)
        together = torch.stack(list(found.values())).reshape(expected.shape)
        torch.testing.assert_close(together, expected, rtol=1e-3, atol=1e-5)
        assert expected.abs().max() > 1e-3
    assert all(parameter.grad is None and parameter.requires_grad for parameter in bundle.model.parameters())
    assert not any(module._forward_pre_hooks for module in bundle.model.modules() if hasattr(module, "in_features"))


def test_taylor_uses_the_number_of_samples_asked_for(bundle, context):
    seen = []
    forward = bundle.model.forward
    bundle.model.forward = lambda **inputs: seen.append(len(inputs["input_ids"])) or forward(**inputs)
    prune(bundle, settings(target="heads", amount=0.25, criterion="taylor", samples=20), context)
    assert sum(seen) == 20


# one-shot


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("target", ["heads", "neurons", "layers", "weights"])
def test_every_family_prunes_and_predicts(tiny, context, name, target):
    bundle = open_bundle(tiny(name, labels=LABELS))
    if name == "t5":  # its head reads the token that ends the text
        context.train, context.validation = ended(context.train), ended(context.validation)
    before = sum(p.numel() for p in bundle.model.parameters())
    criterion = "taylor" if target in ("heads", "layers") else "magnitude"
    prune(bundle, settings(target=target, amount=0.5, criterion=criterion, samples=16), context)
    after = sum(p.numel() for p in bundle.model.parameters())
    assert np.isfinite(predict(bundle, context.validation)).all()
    if target == "weights":
        assert after == before
        assert set(bundle.sparse) == set(zeros(bundle))
        assert all(share == pytest.approx(0.5, abs=0.01) for share in zeros(bundle).values())
    else:
        assert context.notes["parameters_before"] == before
        assert context.notes["parameters_after"] == after < before
    json.dumps(context.notes)


def test_heads_with_the_smallest_scores_go(bundle, context):
    scores = scoring.magnitude(bundle, "heads")
    expected = {f"encoder.{i}.0": sorted(score.argsort()[:2].tolist()) for i, score in enumerate(scores.values())}
    prune(bundle, settings(target="heads", amount=0.5), context)
    assert context.notes["removed"] == expected
    assert context.notes["plain"] is False
    prune(bundle, settings(target="heads", amount=0.5), context)
    shapes = surgery.shapes(bundle.model, bundle.family)["encoder"]
    for number, shape in enumerate(shapes):
        again = context.notes["removed"][f"encoder.{number}.0"]
        assert len(shape.heads[0]) == len(again) == 1
        assert set(shape.heads[0]) | set(again) | set(expected[f"encoder.{number}.0"]) == {0, 1, 2, 3}


def test_global_neurons_in_multiples(bundle, context):
    with torch.no_grad():
        bundle.model.bert.encoder.layer[2].intermediate.dense.weight.mul_(1e-3)
        bundle.model.bert.encoder.layer[2].output.dense.weight.mul_(1e-3)
    prune(bundle, settings(target="neurons", amount=0.4, scope="global", multiple_of=8), context)
    widths = [shape.neurons for shape in surgery.shapes(bundle.model, bundle.family)["encoder"]]
    assert widths[2] == 8  # at least one stays, rounded up
    assert all(width % 8 == 0 for width in widths)
    assert sum(widths) >= round(0.6 * 256)
    assert context.notes["removed"]["encoder.2"] == 56
    assert context.notes["plain"] is False


def test_layers_go_and_names_of_sparse_weights_follow(bundle, context):
    prune(bundle, settings(target="weights", amount=0.5, skip=("*.layer.3.*",)), context)
    assert context.notes["zeros"] == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        for parameter in bundle.model.bert.encoder.layer[1].parameters():
            parameter.mul_(1e-3)
    prune(bundle, settings(target="layers", amount=0.25), context)
    assert context.notes["removed"] == {"encoder": [1]}
    assert context.notes["plain"] is True
    assert bundle.model.config.num_hidden_layers == 3
    assert {int(name.split(".")[3]) for name in bundle.sparse} == {0, 1}
    for name in bundle.sparse:
        assert zeros(bundle)[name] == pytest.approx(0.5, abs=0.01)
    assert zeros(bundle)["bert.encoder.layer.2.attention.self.query.weight"] == 0


def test_threshold_and_skip(bundle, context):
    before = {name: m.weight.detach().clone() for name, m in surgery.linears(bundle.model, bundle.family).items()}
    prune(bundle, settings(threshold=0.2, skip=("*query", "*.layer.0.*")), context)
    for name, module in surgery.linears(bundle.model, bundle.family).items():
        whole = name.endswith("query") or ".layer.0." in name
        assert (f"{name}.weight" in bundle.sparse) is not whole
        expected = before[name] if whole else before[name] * (before[name].abs() >= 0.2)
        assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_two_of_four_runs_along_the_input(tiny, context, name):
    bundle = open_bundle(tiny(name, labels=LABELS))
    prune(bundle, settings(pattern="2:4"), context)
    for linear in surgery.linears(bundle.model, bundle.family).values():
        assert is_two_of_four(surgery.weight_2d(linear))
        assert float((linear.weight == 0).float().mean()) == 0.5
    assert set(bundle.sparse.values()) == {"2:4"}
    prune(bundle, settings(target="neurons", amount=0.1), context)
    for linear_name, linear in surgery.linears(bundle.model, bundle.family).items():
        claims = bundle.sparse[f"{linear_name}.weight"] == "2:4"
        assert claims == is_two_of_four(surgery.weight_2d(linear))
    assert set(bundle.sparse.values()) == {"2:4", "unstructured"}


def test_random_is_seeded(tiny, context):
    found = []
    for seed in (1, 1, 2):
        for target in ("heads", "weights"):
            bundle = open_bundle(tiny("bert", labels=LABELS))
            context.seed = seed
            prune(bundle, settings(target=target, amount=0.5, criterion="random"), context)
            found.append(predict(bundle, context.validation))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[3])
    assert not np.array_equal(found[0], found[4])
    assert not np.array_equal(found[1], found[5])


# gradual


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_gradual_weights_follow_the_schedule_and_stay_zero(bundle, context, monkeypatch, pattern):
    amount = 0.5 if pattern == "2:4" else 0.8
    shares = []
    after = gradual._GradualObjective.after_step

    def watch(self, step, total):
        after(self, step, total)
        shares.append((step, total, zeros(bundle)["bert.encoder.layer.0.output.dense.weight"]))

    monkeypatch.setattr(gradual._GradualObjective, "after_step", watch)
    prune(bundle, settings(amount=amount, gradual="cubic", pattern=pattern, epochs=3), context)
    assert len(shares) == 18
    for step, total, share in shares:
        assert share == pytest.approx(cubic_share(min(step, 14), total, amount), abs=1e-3)
    assert shares[13][2] == pytest.approx(amount, abs=1e-3)  # ceil(.75 x 18)
    assert all(share == pytest.approx(amount, abs=1e-3) for share in zeros(bundle).values())
    assert set(bundle.sparse) == set(zeros(bundle))
    assert context.notes["training"]["best_step"] == 18 or context.notes["training"]["best_step"] >= 14
    if pattern == "2:4":
        assert all(is_two_of_four(m.weight) for m in surgery.linears(bundle.model, bundle.family).values())


@pytest.mark.parametrize(("target", "criterion"), [("heads", "taylor"), ("neurons", "magnitude"), ("heads", "random")])
def test_gradual_parts_are_cut_without_changing_the_outputs(bundle, context, monkeypatch, target, criterion):
    silenced = []

    def before_cut(some, *args):
        silenced.append(predict(some, context.validation))
        return cut(some, *args)

    from flyweight.methods.prune import structured

    cut = structured.cut
    monkeypatch.setattr(structured, "cut", before_cut)
    before = predict(bundle, context.validation)
    prune(
        bundle, settings(target=target, amount=0.5, criterion=criterion, gradual="cubic", epochs=2, samples=8), context
    )
    np.testing.assert_allclose(predict(bundle, context.validation), silenced[0], atol=1e-5)
    assert not np.allclose(silenced[0], before, atol=1e-2)
    shapes = surgery.shapes(bundle.model, bundle.family)["encoder"]
    if target == "heads":
        assert all(len(shape.heads[0]) == 2 for shape in shapes)
    else:
        assert all(shape.neurons == 32 for shape in shapes)


def test_gradual_resumes_to_the_same_weights(tiny, context, tmp_path, monkeypatch):
    """Stopped while the share grows, it goes on and ends as if never stopped."""
    wanted = settings(target="heads", amount=0.5, gradual="cubic", epochs=2)
    whole = prune(open_bundle(tiny("bert", labels=LABELS)), wanted, context)

    class Stop(Exception): ...

    after = gradual._GradualObjective.after_step

    def stop(self, step, total):
        after(self, step, total)
        if step == 8:
            raise Stop

    context.work = tmp_path / "other"
    monkeypatch.setattr("flyweight.training.loop.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(gradual._GradualObjective, "after_step", stop)
    with pytest.raises(Stop):
        prune(open_bundle(tiny("bert", labels=LABELS)), wanted, context)
    monkeypatch.setattr(gradual._GradualObjective, "after_step", after)
    steps = []
    loss = gradual._GradualObjective.loss
    monkeypatch.setattr(gradual._GradualObjective, "loss", lambda self, *a: steps.append(1) or loss(self, *a))
    resumed = prune(open_bundle(tiny("bert", labels=LABELS)), wanted, context)
    assert len(steps) == 12 - 7
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_zeros_survive_gradual_pruning_of_heads(bundle, context):
    prune(bundle, settings(amount=0.5), context)
    prune(bundle, settings(target="heads", amount=0.5, gradual="cubic", epochs=1), context)
    for name in bundle.sparse:
        weight = bundle.model.get_parameter(name)
        assert 0.3 < float((weight == 0).float().mean()) < 0.7


# refusals


def test_quantized_weights_are_refused(bundle, context):
    info = QuantizedTensor(shape=(1, 1), bits=8, scheme="symmetric", granularity="channel")
    bundle.quantized["x"] = Codes(info, torch.zeros(1, 1), torch.ones(1, 1), None)
    with pytest.raises(
        StepError, match="expected float weights to prune, got 1 quantized ones; put prune before quantize"
    ):
        prune(bundle, settings(amount=0.5), context)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": 1e9}, r"a threshold that leaves some weights, got 1000000000.0; the largest weight is"),
        ({"threshold": 1e-30}, r"a threshold that removes a weight"),
        ({"amount": 1e-6}, r"an amount that removes a weight of 2048, got 1e-06"),
        ({"amount": 0.99999}, r"an amount that leaves a weight of 2048"),
        (
            {"amount": 0.5, "skip": ("*.laier.*",)},
            r"a skip pattern that matches a weight, got '\*.laier.\*'; one of them",
        ),
        ({"amount": 0.5, "skip": ("*",)}, r"some weights to prune, got all of them skipped"),
        ({"target": "heads", "amount": 0.9}, r"leaves at least one head of 4 in a block, got 0.9"),
    ],
)
def test_settings_that_come_to_nothing_are_refused_and_change_nothing(bundle, context, values, message):
    before = predict(bundle, context.validation)
    with pytest.raises(StepError, match=message):
        prune(bundle, settings(**values), context)
    assert np.array_equal(predict(bundle, context.validation), before)
    assert not bundle.sparse


@pytest.mark.parametrize(
    "values",
    [
        {"target": "heads", "amount": 0.5, "criterion": "taylor"},
        {"amount": 0.5, "gradual": "cubic"},
    ],
)
def test_without_labels_what_needs_them_is_refused(bundle, context, values):
    context.train = examples(8, labels=False)
    with pytest.raises(StepError, match="labelled examples"):
        prune(bundle, settings(**values), context)


def test_gradual_without_steps_is_refused(bundle, context):
    with pytest.raises(StepError, match="at least one training step"):
        prune(bundle, settings(amount=0.5, gradual="cubic", epochs=0), context)


def test_gradients_of_layers_are_compared_at_one_length(bundle, context, monkeypatch):
    """Else a layer with large gradients would keep all its units in a comparison over all layers."""
    raw = {
        scoring.Group("encoder", 0): torch.tensor([3.0, 4.0]),
        scoring.Group("encoder", 1): torch.tensor([300.0, 400.0]),
    }
    monkeypatch.setattr(scoring, "taylor", lambda *_: raw)
    given = {"target": "neurons", "amount": 0.5, "criterion": "taylor"}
    found = scoring.score(bundle, settings(**given, scope="global"), context)
    assert [score.tolist() for score in found.values()] == [pytest.approx([0.6, 0.8])] * 2
    assert scoring.score(bundle, settings(**given), context) == raw
