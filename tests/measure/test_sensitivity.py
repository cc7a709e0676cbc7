"""What parts cost to lose: against really cutting them out, for every family, and the intervals against a slow bootstrap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import tiny as tiny_models
from flyweight.artifact import write_folder, write_manifest
from flyweight.data import Examples, pack
from flyweight.errors import ModelError, StepError, StorageError
from flyweight.measure import sensitivity as module
from flyweight.measure.harm import Harm, Part, spans
from flyweight.measure.quality import resamples
from flyweight.measure.sensitivity import sensitivity
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.models.load import load
from flyweight.models.storage import restore, save
from flyweight.tasks import task_named
from flyweight.training.predict import predict
from solver_cases import GRIDS, settings_for

LABELS = ("negative", "positive")
GROUPS = 3  # 64 neurons do not divide by it


def opened(tiny: Any, family: str, **changes: Any) -> Bundle:
    """A classifier whose two logits lie apart, so that losing something shows in the loss."""
    bundle = load(tiny(family, labels=LABELS, **changes), task_named("text-classification"))
    with torch.no_grad():
        for path in bundle.family.heads["text-classification"]:
            for parameter in bundle.model.get_submodule(path).parameters():
                parameter.mul_(3)
    return bundle


def texts(bundle: Bundle, labels: bool = True) -> Examples:
    """Sentences of all lengths with labels in turn."""
    found = bundle.encoder._replace(truncate=True).examples(tiny_models.SENTENCES)
    return replace(found, labels=np.arange(len(found)) % 2) if labels else found


def cut(bundle: Bundle, part: Part) -> Bundle:
    """A copy without the part, by surgery; what surgery cannot take out whole is multiplied by zero."""
    made = bundle.copy()
    model, family = made.model, made.family
    block = surgery.blocks(model, family)[part.stack][part.block]
    row = surgery.stacks(model, family)[part.stack]
    down = surgery.mlp_linears(block, row)[1]
    if part.kind == "layer":
        count = len(surgery.blocks(model, family)[part.stack])
        surgery.keep_layers_of(made, {part.stack: [i for i in range(count) if i != part.block]})
    elif part.kind == "head":
        assert part.attention is not None
        units = surgery.layout(block, row.attention[part.attention]).units
        keep = [unit for unit in range(units) if unit != part.number]
        surgery.keep_heads(model, family, part.stack, part.block, part.attention, keep)
    elif part.kind == "neurons":
        assert part.neurons is not None
        keep = [i for i in range(surgery.weight_2d(down).shape[1]) if i not in part.neurons]
        surgery.keep_neurons(model, family, part.stack, part.block, keep)
    else:
        reader = down if part.attention is None else block.get_submodule(row.attention[part.attention].o)
        surgery.weight_2d(reader).data.zero_()
    return made


def losses(bundle: Bundle, examples: Examples) -> torch.Tensor:
    assert examples.labels is not None
    logits = torch.from_numpy(predict(bundle, examples))
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(examples.labels), reduction="none")


def size(bundle: Bundle) -> int:
    return sum(parameter.numel() for parameter in bundle.model.parameters())


def check(bundle: Bundle, examples: Examples, found: Harm) -> None:
    """Every part's cost, change and weights, by cutting it out."""
    assert examples.labels is not None
    whole, logits = losses(bundle, examples), predict(bundle, examples)
    right = (logits.argmax(-1) == examples.labels).mean()
    assert found.whole["loss"] == pytest.approx(float(whole.mean()), abs=1e-5)
    assert found.whole["accuracy"] == pytest.approx(right)
    for part in found.parts:
        less = cut(bundle, part)
        rise = float((losses(less, examples) - whole).mean())
        assert part.cost.value == pytest.approx(rise, abs=2e-5, rel=1e-4), part.name
        assert part.change is not None
        now = (predict(less, examples).argmax(-1) == examples.labels).mean()
        assert part.change.value == pytest.approx(now - right, abs=1e-7), part.name
        if part.kind in ("head", "neurons", "layer"):
            assert size(bundle) - size(less) == part.weights, part.name
    assert max(abs(part.cost.value) for part in found.parts) > 0.01


@pytest.mark.parametrize("family", tiny_models.CLASSIFIERS)
def test_a_part_costs_what_cutting_it_out_costs(family: str, tiny: Any) -> None:
    bundle = opened(tiny, family)
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    found = sensitivity(bundle, texts(bundle), GROUPS)
    for name, value in bundle.model.state_dict().items():
        assert torch.equal(value, before[name])
    check(bundle, texts(bundle), found)


def test_all_parts_are_there_in_the_models_order(tiny: Any) -> None:
    bundle = opened(tiny, "t5")
    found = sensitivity(bundle, texts(bundle), GROUPS)
    heads = [("head", 0, unit, unit) for unit in range(4)]
    crossed = [("head", 1, unit, unit) for unit in range(4)]
    rest = [*(("neurons", None, group, None) for group in range(GROUPS)), ("feed-forward", None, None, None)]
    rest.append(("layer", None, None, None))
    one, two = ("attention", 0, None, None), ("attention", 1, None, None)
    wanted = [("encoder", b, *p) for b in range(3) for p in (*heads, one, *rest)]
    wanted += [("decoder", b, *p) for b in range(3) for p in (*heads, one, *crossed, two, *rest)]
    assert [(p.stack, p.block, p.kind, p.attention, p.number, p.head) for p in found.parts] == wanted
    assert found.of("head", "decoder")[4].name == "decoder 0, cross-head 0"
    assert len(found.of("layer")) == 6


@pytest.mark.parametrize("family", ["bert", "mpnet", "t5"])
def test_pruned_models(family: str, tiny: Any) -> None:
    """Every block with other heads and another number of neurons; one layer gone, of T5's decoder the first."""
    bundle = opened(tiny, family)
    model, row = bundle.model, bundle.family
    for stack in surgery.stacks(model, row):
        surgery.keep_heads(model, row, stack, 0, 0, [1, 3])
        surgery.keep_heads(model, row, stack, 1, 0, [0, 2, 3])
        surgery.keep_neurons(model, row, stack, 1, range(0, 64, 3))
        surgery.keep_neurons(model, row, stack, 2, [5, 60])  # fewer than groups
    last = "decoder" if family == "t5" else "encoder"
    surgery.keep_layers_of(bundle, {last: range(1 if family == "t5" else 0, len(surgery.blocks(model, row)[last]))})
    found = sensitivity(bundle, texts(bundle), GROUPS)
    first = [part for part in found.of("head") if part.stack == "encoder" and part.block == 0]
    assert [(part.number, part.head) for part in first] == [(0, 1), (1, 3)]
    few = [part for part in found.of("neurons", "encoder") if part.block == 2]
    assert [len(part.neurons or ()) for part in few] == [1, 1]
    whole, examples = losses(bundle, texts(bundle)), texts(bundle)
    for part in found.parts:
        one_left = part.kind == "layer" and len(surgery.blocks(model, row)[part.stack]) == 1
        if not one_left:
            rise = float((losses(cut(bundle, part), examples) - whole).mean())
            assert part.cost.value == pytest.approx(rise, abs=2e-5, rel=1e-4), part.name


def test_parts_that_are_gone_cost_nothing_to_lose(tiny: Any) -> None:
    bundle = opened(tiny, "bert")
    surgery.keep_heads(bundle.model, bundle.family, "encoder", 1, 0, [])
    surgery.keep_neurons(bundle.model, bundle.family, "encoder", 2, [])
    examples = texts(bundle)
    found = sensitivity(bundle, examples, groups=3)
    check(bundle, examples, found)
    kinds = [{part.kind for part in found.parts if part.block == block} for block in range(4)]
    every = {"head", "attention", "neurons", "feed-forward", "layer"}
    assert kinds == [every, every - {"head", "attention"}, every - {"neurons", "feed-forward"}, every]


def test_groups_are_sorted_by_what_neurons_write(tiny: Any) -> None:
    bundle = opened(tiny, "bert")
    examples = texts(bundle)
    found = sensitivity(bundle, examples, 5)
    for number, block in enumerate(surgery.blocks(bundle.model, bundle.family)["encoder"]):
        down = surgery.mlp_linears(block, surgery.stacks(bundle.model, bundle.family)["encoder"])[1]
        seen: list[torch.Tensor] = []
        hook = down.register_forward_hook(lambda m, given, out, seen=seen: seen.append(given[0][0]))
        for i in range(len(examples)):  # one text at a time: nothing is padding
            predict(bundle, examples.take([i]))
        hook.remove()
        read = torch.cat(seen).double()  # [tokens, neurons]
        written = [
            float((read[:, i].square().mean()).sqrt() * down.weight.detach()[:, i].double().norm())
            for i in range(read.shape[1])
        ]
        order = sorted(range(64), key=lambda i: -written[i])
        groups = [part.neurons for part in found.of("neurons") if part.block == number]
        assert [len(group or ()) for group in groups] == [13, 13, 13, 13, 12]
        start = 0
        for group in groups:
            assert group is not None
            assert sorted(order[start : start + len(group)]) == list(group)
            start += len(group)


def test_without_labels_answers_are_held_against_the_whole_models(tiny: Any) -> None:
    bundle = opened(tiny, "distilbert")
    examples = texts(bundle, labels=False)
    found = sensitivity(bundle, examples, GROUPS)
    assert (found.cost, found.metric, found.whole) == ("KL divergence", "same answer", {})
    logits = predict(bundle, examples).astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for part in found.parts:
        other = predict(cut(bundle, part), examples).astype(np.float64)
        q = np.exp(other) / np.exp(other).sum(-1, keepdims=True)
        assert part.cost.value == pytest.approx((p * np.log(p / q)).sum(-1).mean(), abs=1e-5, rel=1e-4)
        assert part.cost.low >= -1e-9
        assert part.change is not None
        assert part.change.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean() - 1)
    assert any(part.change and part.change.value < 0 for part in found.parts)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_vectors_are_held_against_the_whole_models(family: str, tiny: Any) -> None:
    bundle = load(tiny(family), task_named("embedding"))
    examples = texts(bundle, labels=False)
    found = sensitivity(bundle, examples, GROUPS)
    assert (found.cost, found.metric) == ("1 - cosine", None)
    whole = predict(bundle, examples).astype(np.float64)
    for part in found.parts:
        other = predict(cut(bundle, part), examples).astype(np.float64)
        cosine = (whole * other).sum(-1) / np.linalg.norm(whole, axis=-1) / np.linalg.norm(other, axis=-1)
        assert part.cost.value == pytest.approx(1 - cosine.mean(), abs=1e-5)
        assert part.change is None
    assert max(part.cost.value for part in found.parts) > 0.01


def test_intervals_are_a_paired_bootstrap() -> None:
    chance = np.random.default_rng(5)
    differences = chance.normal(0.3, 1.0, (3, 40))
    generator = np.random.default_rng(7)
    means = np.stack([differences[:, rows].mean(1) for rows in generator.integers(0, 40, (2000, 40))])
    for span, values, sampled in zip(spans(differences, seed=7), differences, means.T, strict=True):
        low, high = np.percentile(sampled, [2.5, 97.5])
        assert (span.value, span.low, span.high) == pytest.approx((values.mean(), low, high))
    always = spans(np.full((1, 9), -2.0))[0]
    assert (always.value, always.low, always.high, always.told) == (-2.0, -2.0, -2.0, True)
    assert not spans(np.asarray([[1.0, -1.0] * 10]))[0].told


def test_resamples_in_chunks_are_those_of_quality(monkeypatch: Any) -> None:
    """One seed draws the same examples as the intervals of quality do, however few rows are drawn at a time."""
    task = task_named("embedding")
    vectors = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    reference = np.random.default_rng(1).normal(size=(30, 4)).astype(np.float32)
    examples = pack([([1], None)] * 30, reference)
    wanted = np.percentile(resamples(task, vectors, examples, seed=3)["cosine"], [2.5, 97.5])
    for chunk in (2**21, 100):
        monkeypatch.setattr("flyweight.measure.harm.CHUNK", chunk)
        span = spans(task.scores(vectors, examples)[None], seed=3)[0]
        assert (span.low, span.high) == pytest.approx(tuple(wanted), abs=1e-6)


def test_batches_do_not_matter(tiny: Any, monkeypatch: Any) -> None:
    bundle = opened(tiny, "mpnet")
    one = sensitivity(bundle, texts(bundle), GROUPS)
    monkeypatch.setattr(module, "neutral_batch", lambda activations: 4)
    two = sensitivity(bundle, texts(bundle), GROUPS)
    for a, b in zip(one.parts, two.parts, strict=True):
        assert a.neurons == b.neurons
        assert a.cost.value == pytest.approx(b.cost.value, abs=2e-5)


@pytest.mark.parametrize("activations", ["none", "dynamic", "token", "static"])
def test_quantized_artifacts(activations: str, tiny: Any, tmp_path: Any) -> None:
    """Weights as they are stored, inputs rounded as the engine does: the loss is that of torch as an engine."""
    from flyweight.engines.torch import predictor
    from flyweight.measure.quality import answers
    from flyweight.methods.quantize import quantize
    from flyweight.runtime import neutral_batch
    from solver_cases import context

    bundle = opened(tiny, "bert")
    task = task_named("text-classification")
    settings = settings_for(GRIDS[2], "nearest", bits=8, activations=activations, samples=15)
    made = quantize(bundle, settings, context(tmp_path / "work", texts(bundle, labels=False), task))
    with write_folder(tmp_path / "artifact") as folder:
        write_manifest(folder, save(made, folder))
    packed = restore(tmp_path / "artifact")
    assert packed.quantized
    assert packed.activations == activations
    found = sensitivity(packed, texts(packed), GROUPS)

    def loss_of(some: Bundle) -> float:
        batch = neutral_batch(some.activations)
        outputs = torch.from_numpy(answers(predictor(some), texts(some), some.encoder.pad, batch))
        return float(torch.nn.functional.cross_entropy(outputs, torch.arange(len(outputs)) % 2))

    whole = loss_of(packed)
    assert found.whole["loss"] == pytest.approx(whole, abs=1e-4)
    first = next(part for part in found.parts if part.kind == "attention")
    silent = packed.copy()
    reader = surgery.blocks(silent.model, silent.family)["encoder"][first.block].attention.output.dense
    reader.weight.data.zero_()
    assert first.cost.value == pytest.approx(loss_of(silent) - whole, abs=1e-4)
    head = found.of("head")[5]
    assert head.number is not None
    silent = packed.copy()
    reader = surgery.blocks(silent.model, silent.family)["encoder"][head.block].attention.output.dense
    reader.weight.data[:, 8 * head.number : 8 * head.number + 8] = 0
    if activations == "none":  # a cut head takes its share of the range with it, zeroed weights do not
        assert head.cost.value == pytest.approx(loss_of(silent) - whole, abs=1e-5)


class Watched:
    """Takes down what a person would see."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.at = self.total = 0

    def track(self, items: Any, what: str, total: int | None = None, done: int = 0) -> Iterator[Any]:
        self.total = total or 0
        for item in items:
            yield item
            self.at += 1

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_time_is_told_before_and_counted_in_blocks(tiny: Any) -> None:
    bundle, seen = opened(tiny, "bert"), Watched()
    found = sensitivity(bundle, texts(bundle), GROUPS, progress=seen)
    assert (
        "40 parts on 15 examples, about " in seen.notes[0]
    )  # 4 x (4 heads + attention + 3 groups + feed-forward + layer)
    assert len(found.parts) == 40
    assert seen.at == seen.total == sum(1 + 10 * left for left in (4, 3, 2, 1))
    assert 0 < found.seconds < 100 * found.expected


def test_blocks_before_are_not_run_again(tiny: Any) -> None:
    bundle = opened(tiny, "bert")
    ran: list[int] = []
    for number, block in enumerate(surgery.blocks(bundle.model, bundle.family)["encoder"]):
        block.attention.self.register_forward_hook(lambda *_, number=number: ran.append(number))
    sensitivity(bundle, texts(bundle), GROUPS)
    # warmed up and timed whole; ten parts of each block before; entered once; its own parts but the layer, which leaves it out
    assert {number: ran.count(number) for number in range(4)} == {b: 2 + 10 * b + 1 + 9 for b in range(4)}


def test_the_model_is_put_back_even_after_an_error(tiny: Any) -> None:
    bundle = opened(tiny, "bert")
    before = predict(bundle, texts(bundle))
    bundle.model.train()
    blocks = surgery.blocks(bundle.model, bundle.family)["encoder"]
    kept = blocks[3].output.dense.weight.data.clone()
    calls = 0

    def spoil(linear: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * float("nan") if calls == 30 else output

    hook = blocks[3].output.dense.register_forward_hook(spoil)
    with pytest.raises(StepError, match="finite answers of the model, got NaN"):
        sensitivity(bundle, texts(bundle), GROUPS)
    hook.remove()
    assert bundle.model.training
    assert not any("forward" in part.__dict__ for part in bundle.model.modules())
    assert not any(part._forward_pre_hooks for part in bundle.model.modules())
    assert torch.equal(blocks[3].output.dense.weight, kept)
    assert np.array_equal(predict(bundle, texts(bundle)), before)


def test_what_cannot_be_measured_is_refused(tiny: Any, monkeypatch: Any) -> None:
    translator = load(tiny("t5"), task_named("embedding"))
    with pytest.raises(ModelError, match="a t5 model without a classification head"):
        sensitivity(translator, texts(translator, labels=False))
    bundle = opened(tiny, "bert")
    monkeypatch.setattr(module, "usable_memory", lambda: 1000)
    with pytest.raises(StorageError, match="lower --samples"):
        sensitivity(bundle, texts(bundle))


def test_json_goes_there_and_back(tiny: Any) -> None:
    bundle = opened(tiny, "distilbert")
    found = sensitivity(bundle, texts(bundle), GROUPS)
    assert Harm.model_validate_json(found.model_dump_json()) == found
