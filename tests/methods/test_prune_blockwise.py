"""Blocks trained to answer as the dense ones where weights or whole layers went: which answers they learn, what stays zero."""

from __future__ import annotations

import pytest
import torch

import tiny as folders
from flyweight.context import Context
from flyweight.errors import SettingsError, StepError
from flyweight.methods.prune import prune, rebuild
from flyweight.methods.prune.blockwise import stand_ins
from flyweight.models import surgery
from flyweight.settings import PruneSettings
from flyweight.tasks import task_named
from training_cases import open_bundle


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(rebuild, "STEPS", 16)
    monkeypatch.setattr(rebuild, "RATE", 3e-3)


def context(tmp_path, bundle, **changes):
    task = task_named("embedding")
    texts = bundle.encoder._replace(truncate=True).examples(folders.SENTENCES)
    given = {"calibration": texts, "device": "cpu", **changes}
    return Context(
        task=task, seed=3, work=tmp_path / "work", reference=lambda: None, load=lambda _: None, notes={}, **given
    )


def settings(**values):
    return PruneSettings(**{"restore": "block", "samples": len(folders.SENTENCES), **values})


def states(bundle, texts):
    """[layers + 1] hidden states of every token, [tokens, width] each, as the whole model runs by itself."""
    found = [[] for _ in range(len(surgery.blocks(bundle.model, bundle.family)["encoder"]) + 1)]
    for row in range(len(texts)):
        batch = {name: torch.from_numpy(one) for name, one in texts.batch([row], bundle.encoder.pad).items()}
        with torch.no_grad():
            out = bundle.model.eval()(**batch, output_hidden_states=True)
        for number, one in enumerate(out.hidden_states):
            found[number].append(one[0])
    return [torch.cat(one) for one in found]


def test_a_block_stands_in_for_those_behind_it_that_went():
    assert stand_ins([0, 1, 2], 3) == [0, 1, 2]
    assert stand_ins([0, 3], 6) == [2, 5]
    assert stand_ins([1, 2], 4) == [1, 3]
    assert stand_ins([0], 2) == [1]


@pytest.mark.parametrize("name", ["bert", "mpnet"])
def test_layers_that_stay_learn_the_answers_of_those_that_went(tiny, tmp_path, name):
    dense = open_bundle(tiny(name), task="embedding")
    given = context(tmp_path, dense)
    wanted = states(dense, given.calibration)
    kept = [0, 3]
    alone = dense.copy()
    surgery.keep_layers(alone.model, alone.family, {"encoder": kept})
    bundle = dense.copy()

    scores = {0: 4.0, 3: 3.0}
    import flyweight.methods.prune as module

    depth = len(wanted) - 1
    assert depth == 4
    fixed = {next(iter(module.groups(bundle, "layers"))): torch.tensor([scores.get(i, 0.0) for i in range(depth)])}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "score", lambda *_: fixed)
        prune(bundle, settings(target="layers", amount=0.5), given)
    told = list(given.notes["block_error"].values())
    assert len(told) == 2
    cut, made = states(alone, given.calibration), states(bundle, given.calibration)

    def error(found, place):
        target = wanted[place + 1]
        return float(((found - target).square().mean() / target.square().mean()).sqrt())

    assert told[0]["without"] == pytest.approx(error(cut[1], 2), rel=1e-4)
    for number, place in enumerate([2, 3]):
        assert told[number]["block"] == pytest.approx(error(made[number + 1], place), rel=1e-3)
        assert told[number]["block"] < 0.9 * told[number]["without"]
    assert error(made[2], 3) < 0.9 * error(cut[2], 3)


@pytest.mark.parametrize("criterion", ["magnitude", "hessian"])
def test_weights_that_stay_make_up_for_those_that_went_and_zeros_stay(tiny, tmp_path, criterion):
    dense = open_bundle(tiny("bert"), task="embedding")
    made = {}
    for restore in ("none", "block"):
        given = context(tmp_path / restore, dense)
        made[restore] = prune(
            dense.copy(), settings(target="weights", amount=0.6, criterion=criterion, restore=restore), given
        )
    assert made["none"].sparse == made["block"].sparse
    assert made["block"].sparse
    changed = 0
    for name in made["none"].sparse:
        before, after = (one.model.get_parameter(name) for one in made.values())
        assert torch.equal(before == 0, after == 0)
        changed += not torch.equal(before, after)
    assert changed == len(made["none"].sparse)
    wanted = states(dense, given.calibration)[-1]
    errors = {name: float((states(one, given.calibration)[-1] - wanted).square().sum()) for name, one in made.items()}
    assert errors["block"] < 0.8 * errors["none"]
    for error in given.notes["block_error"].values():
        assert error["block"] <= error["without"]


def test_both_stacks_of_an_encoder_decoder(tiny, tmp_path):
    dense = open_bundle(tiny("t5"), task="embedding")
    given, bundle = context(tmp_path, dense), dense.copy()
    depths = {name: len(one) for name, one in surgery.blocks(dense.model, dense.family).items()}
    prune(bundle, settings(target="layers", amount=0.5), given)
    assert len(given.notes["block_error"]) == sum(
        len(one) for one in surgery.blocks(bundle.model, bundle.family).values()
    )
    assert sum(depths.values()) > len(given.notes["block_error"])


def test_what_does_not_go_together_is_refused(tiny, tmp_path):
    for values, text in (
        ({"target": "weights", "amount": 0.5, "restore": "linear"}, "restore linear goes with heads and neurons"),
        ({"target": "layers", "amount": 0.5, "restore": "masks"}, "restore masks goes with heads and neurons"),
        ({"target": "vocabulary", "restore": "block"}, "restore block goes with heads and neurons"),
        ({"target": "weights", "amount": 0.5, "gradual": "cubic"}, "set restore to none"),
    ):
        with pytest.raises(SettingsError, match=text):
            PruneSettings.read({"restore": "block", **values}, "prune")
    bundle = open_bundle(tiny("bert"), task="embedding")
    for values in ({"target": "layers", "amount": 0.5}, {"target": "weights", "amount": 0.5}):
        before = [one.clone() for one in bundle.model.parameters()]
        with pytest.raises(StepError, match="texts to calibrate on, got none"):
            prune(bundle, settings(**values), context(tmp_path, bundle, calibration=None))
        assert all(torch.equal(a, b) for a, b in zip(before, bundle.model.parameters(), strict=True))
