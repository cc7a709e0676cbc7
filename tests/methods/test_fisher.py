"""Fisher information of gates: gradients against single examples, swaps against every possible choice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.methods.prune import fisher
from flyweight.methods.prune.scores import Group
from flyweight.models import surgery
from flyweight.settings import PruneSettings
from flyweight.tasks import task_named
from training_cases import Notes, examples, open_bundle

LABELS = ("negative", "positive")
GIVEN = {"target": "heads+neurons", "amount": 0.5, "criterion": "fisher"}


def context(tmp_path, task="text-classification", **changes) -> Context:
    given = {"train": examples(11), "device": "cpu", **changes}
    return Context(
        task=task_named(task), seed=3, work=tmp_path / "work", reference=lambda: None, load=lambda _: None, **given
    )


def slow(bundle, data, loss):
    """{group: [examples, units]}: one backward pass an example, gradient x weight over the columns of o and down."""
    stack = surgery.stacks(bundle.model, bundle.family)["encoder"]
    blocks = surgery.blocks(bundle.model, bundle.family)["encoder"]
    found = {}
    bundle.model.eval()
    for i in range(len(data)):
        batch = {k: torch.from_numpy(v) for k, v in data.batch([i], bundle.encoder.pad).items()}
        output = bundle.model(**{key: batch[key] for key in bundle.family.inputs})
        bundle.model.zero_grad()
        loss(i, output, batch).backward()
        for number, block in enumerate(blocks):
            o, down = block.get_submodule(stack.attention[0].o), surgery.mlp_linears(block, stack)[1]
            for group, module, units in ((Group("encoder", number, 0), o, 4), (Group("encoder", number), down, 64)):
                product = (module.weight * module.weight.grad).detach().reshape(32, units, -1).sum((0, 2))
                found.setdefault(group, []).append(product)
    bundle.model.zero_grad()
    return {group: torch.stack(rows) for group, rows in found.items()}


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_gradients_are_those_of_single_examples_and_their_squares_the_diagonal(tiny, tmp_path, name):
    bundle, data = open_bundle(tiny(name, labels=LABELS)), examples(11)
    chosen = np.random.default_rng(3).permutation(11)  # by the seed, then by length
    data = data.take(chosen[np.argsort(data.lengths[chosen], kind="stable")])

    def loss(i, output, _):
        return torch.nn.functional.cross_entropy(output.logits, torch.tensor([int(data.labels[i])]))

    expected = slow(bundle, data, loss)
    found = fisher.gradients(bundle, PruneSettings(**GIVEN), context(tmp_path))
    assert list(found) == [Group("encoder", n, part) for n in range(4) for part in (0, None)]
    scores = fisher.diagonal(found)
    for group, gradient in found.items():
        torch.testing.assert_close(gradient, expected[group], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(scores[group], expected[group].square().mean(0), rtol=1e-3, atol=1e-7)
        assert scores[group].max() > 1e-5
        whole = fisher.information(gradient)
        torch.testing.assert_close(whole.diagonal().float(), scores[group])
        gone = torch.zeros(len(whole), dtype=torch.float64)
        gone[[0, 2]] = 1
        assert fisher.expected(gradient, [0, 2]) == pytest.approx(float(gone @ whole @ gone) / 2, rel=1e-6)


def test_for_vectors_it_is_the_squared_way_that_they_move(tiny, tmp_path):
    """With random signs r, the mean of g g^T comes near J^T J; J [width, units] taken entry by entry."""
    bundle = open_bundle(tiny("bert"), task="embedding")
    settings = PruneSettings(**{**GIVEN, "samples": 2})
    group = Group("encoder", 2, 0)
    texts = examples(2, labels=False)
    answer = task_named("embedding").answer
    rows = [slow(bundle, texts, lambda _, output, batch, k=k: answer(output, batch)[0, k])[group] for k in range(32)]
    jacobian = torch.stack(rows, 1).double()  # [texts, width, units]
    wanted = (jacobian.transpose(1, 2) @ jacobian).mean(0)
    total = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(300):
        given = context(tmp_path / str(seed), "embedding", train=None, calibration=texts)
        given.seed = seed
        total += fisher.information(fisher.gradients(bundle, settings, given)[group]) / 300
    assert float((total - wanted).norm() / wanted.norm()) < 0.2
    half = total - torch.diag(total.diagonal())
    assert float((half - wanted + torch.diag(wanted.diagonal())).norm() / wanted.norm()) < 0.2


def test_without_labels_they_are_drawn_from_the_models_own_answers(tiny, tmp_path):
    bundle = open_bundle(tiny("bert", labels=LABELS))
    settings = PruneSettings(**{**GIVEN, "samples": 1})
    texts, group = examples(1, labels=False), Group("encoder", 1)
    with torch.no_grad():
        batch = {k: torch.from_numpy(v) for k, v in texts.batch([0], bundle.encoder.pad).items()}
        bundle.model.eval()
        share = bundle.model(**{k: batch[k] for k in bundle.family.inputs}).logits.softmax(-1)[0]
    by_label = [
        slow(bundle, texts, lambda _, output, __, y=y: torch.nn.functional.cross_entropy(output.logits, y))[group][0]
        for y in (torch.tensor([0]), torch.tensor([1]))
    ]
    drawn = []
    for seed in range(40):
        given = context(tmp_path / str(seed), train=texts)
        given.seed = seed
        found = fisher.gradients(bundle, settings, given)[group][0]
        near = [torch.allclose(found, one, rtol=1e-3, atol=1e-6) for one in by_label]
        assert sum(near) == 1
        drawn.append(near.index(True))
    assert np.mean(drawn) == pytest.approx(float(share[1]), abs=0.25)


def test_what_was_found_is_kept_for_the_same_model_and_texts(tiny, tmp_path, monkeypatch):
    bundle, given = open_bundle(tiny("bert", labels=LABELS)), context(tmp_path, progress=Notes())
    settings = PruneSettings(**GIVEN)
    first = fisher.gradients(bundle, settings, given)
    monkeypatch.setattr(fisher, "visit", None)
    again = fisher.gradients(bundle, PruneSettings(**{**GIVEN, "amount": 0.25}), given)
    assert all(torch.equal(again[group], first[group]) for group in first)
    with torch.no_grad():
        bundle.model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(TypeError):
        fisher.gradients(bundle, settings, given)
    assert any("belongs to other" in line for line in given.progress.lines)


def test_without_any_text_it_is_refused(tiny, tmp_path):
    bundle = open_bundle(tiny("bert", labels=LABELS))
    with pytest.raises(StepError, match="expected texts to take Fisher information on, got none; give --train F or"):
        fisher.gradients(bundle, PruneSettings(**GIVEN), context(tmp_path, train=None))


def loss_of(matrix, gone):
    return float(matrix[gone][:, gone].sum()) / 2


def drawn(units, examples, seed):
    gradient = torch.randn(examples, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return gradient.t() @ gradient / examples


@pytest.mark.parametrize("count", [1, 3, 6])
def test_swaps_end_where_no_single_one_helps_and_never_above_the_start(count):
    found_best = 0
    for seed in range(20):
        matrix = drawn(8, 5, seed)
        start = matrix.diagonal().argsort()[:count].tolist()
        found = fisher.rearranged(matrix, start)
        assert len(set(found)) == count
        now = loss_of(matrix, found)
        assert now <= loss_of(matrix, start) + 1e-12
        for i, j in itertools.product(found, set(range(8)) - set(found)):
            assert loss_of(matrix, [u for u in found if u != i] + [j]) >= now - 1e-9
        found_best += now <= min(loss_of(matrix, list(c)) for c in itertools.combinations(range(8), count)) + 1e-9
    assert found_best >= (20 if count == 1 else 8)  # with one, every choice is a swap away


def test_units_that_cancel_go_together():
    """0 and 1 do the same, 2 undoes what 3 does: alone 0 and 1 matter least, together 2 and 3 do not matter at all."""
    one, two = torch.tensor([1.0, 0, 0, 1]), torch.tensor([0.0, 1.5, -1.5, 0])
    gradient = torch.stack([one, one, two, -two * 1.01, 9 * torch.ones(4)], 1)
    matrix = fisher.information(gradient)
    assert matrix.diagonal().argsort()[:2].tolist() == [0, 1]
    assert fisher.rearranged(matrix, [0, 1]) == [2, 3]
    assert fisher.rearranged(matrix, []) == []
    assert fisher.rearranged(matrix, [0, 1, 2, 3, 4]) == [0, 1, 2, 3, 4]
