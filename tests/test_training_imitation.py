"""What is taken from inside two models, and which part of the one is held against which of the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="distillation needs the extra `compress`")

import training_cases as cases  # noqa: E402
from flyweight.errors import StepError  # noqa: E402
from flyweight.models.bundle import Bundle  # noqa: E402
from flyweight.models.stream import keep_dimensions  # noqa: E402
from flyweight.models.surgery import keep_heads, keep_layers_of  # noqa: E402
from flyweight.settings import DistillSettings, QuantizeSettings  # noqa: E402
from flyweight.training import losses, pair  # noqa: E402
from flyweight.training.imitation import Weights, check_inside, head_pairs, imitation  # noqa: E402
from flyweight.training.watch import one_stack, watch  # noqa: E402

LABELS = ("negative", "positive")
IDS = torch.tensor([[0, 10, 11, 20, 2], [0, 12, 2, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def bundle_of(tiny: Callable[..., Path], model_type: str, seed: int = 0, **changes: int) -> Bundle:
    bundle = cases.open_bundle(tiny(model_type, labels=LABELS, seed=seed, **changes), dropout=0.0)
    bundle.model.set_attn_implementation("eager")
    return bundle


def cut_heads(bundle: Bundle, keep: dict[int, list[int]]) -> None:
    for block, heads in keep.items():
        keep_heads(bundle.model, bundle.family, "encoder", block, 0, heads)


# what is taken


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra", "mpnet"])
def test_scores_are_what_the_model_takes_the_softmax_of(
    tiny: Callable[..., Path], model_type: str, pruned: bool
) -> None:
    """MPNet's relative position bias among them, and of that the columns of the heads that a block still has."""
    bundle = bundle_of(tiny, model_type)
    if pruned:
        cut_heads(bundle, {0: [1, 3], 2: [2]})
    with watch(bundle, attention=range(4), embeddings=True) as seen, torch.no_grad():
        found = bundle.model(input_ids=IDS, attention_mask=MASK, output_attentions=True, output_hidden_states=True)
    for number, shares in enumerate(found.attentions):
        scores = seen.scores(number).masked_fill(MASK[:, None, None] == 0, -torch.inf)
        assert scores.shape[1] == (([2, 4, 1, 4] if pruned else [4] * 4)[number])
        real = MASK.bool()
        got, expected = (x.transpose(1, 2)[real] for x in (scores.softmax(-1), shares))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen.entry, found.hidden_states[0])
    assert not seen.hidden


def test_watching_nothing_hangs_nothing_on_the_model(tiny: Callable[..., Path]) -> None:
    bundle = bundle_of(tiny, "bert")
    with watch(bundle):
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in bundle.model.modules())
    with watch(bundle, hidden=[1], attention=[2], embeddings=True):
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in bundle.model.modules()) == 5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bundle.model.modules())


# which imitates which


def test_layer_maps() -> None:
    assert pair.layer_map("uniform", 3, 6) == pair.layer_map(None, 3, 6) == [1, 3, 5]
    assert pair.layer_map("last", 3, 6) == [3, 4, 5]
    assert pair.layer_map("last", 6, 6) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(StepError, match="at most the teacher's 3 layers for layer_map last, got 6"):
        pair.layer_map("last", 6, 3)


def test_heads_of_the_same_number_go_together(tiny: Callable[..., Path]) -> None:
    student, teacher = (bundle_of(tiny, "bert") for _ in range(2))
    keep_layers_of(student, {"encoder": [0, 2]})
    cut_heads(student, {0: [1, 3]})
    cut_heads(teacher, {1: [1, 2, 3]})
    pairs = head_pairs(student, teacher, [1, 3])
    assert [tuple(pair) for pair in pairs] == [([0, 1], [0, 2]), ([0, 1, 2, 3], [0, 1, 2, 3])]
    cut_heads(teacher, {3: [0, 1]})
    with pytest.raises(StepError, match="student layer 1 in teacher layer 3 .* got no head 2 there"):
        head_pairs(student, teacher, [1, 3])
    with pytest.raises(StepError, match="with the teacher's 4 heads for attention_weight, got 2; use relation_weight"):
        head_pairs(bundle_of(tiny, "bert", num_attention_heads=2), teacher, [0, 1, 2, 3])


def test_a_student_is_checked_by_the_blocks_that_will_be_left(tiny: Callable[..., Path]) -> None:
    """As `imitation` does once it is cut: what block 1 lacks counts where block 1 stays, and nowhere else."""
    student, teacher = (bundle_of(tiny, "bert") for _ in range(2))
    cut_heads(student, {1: [1, 2]})
    cut_heads(teacher, {3: [1, 2, 3]})
    asked = settings(attention_weight=1.0, relation_weight=1.0, relation_heads=8)
    check_inside(student, teacher, asked.model_copy(update={"layer_map": (1, 3)}), [0, 1])
    with pytest.raises(StepError, match="student layer 1 in teacher layer 3 .* got no head 0 there"):
        check_inside(student, teacher, asked.model_copy(update={"layer_map": (1, 3)}), [1, 0])
    by_relations = settings(relation_weight=1.0, relation_heads=16, layer_map=(2,))
    check_inside(student, teacher, by_relations, [1])  # 2 heads of 8
    check_inside(student, teacher, by_relations.model_copy(update={"width": 16}), [0])  # 4 heads of 4
    with pytest.raises(StepError, match="divide the student's 8 and the teacher's 32, got 16; set it to 2, 4 or 8"):
        check_inside(student, teacher, by_relations.model_copy(update={"width": 16}), [1])


def test_what_is_gone_has_nothing_to_imitate(tiny: Callable[..., Path]) -> None:
    """Blocks without attention take no part in the loss of scores; a narrower stream gets a map to the teacher's."""
    student, teacher = (bundle_of(tiny, "bert", seed) for seed in (0, 1))
    cut_heads(student, {1: [], 2: [0, 3]})
    keep_dimensions(student.model, student.family, range(24))
    made = imitation(student, teacher, settings(attention_weight=1.0, hidden_weight=1.0), seed=0)
    assert made is not None
    assert [tuple(one.weight.shape) for one in made.maps] == [(32, 24)] * 4
    only = replace(made, weights=made.weights._replace(hidden=0.0))
    with torch.no_grad(), only.watch_student(student) as mine, only.watch_teacher() as theirs:
        for who in (student, teacher):
            who.model(input_ids=IDS, attention_mask=MASK)
        found = float(only.loss(mine, theirs, MASK))
        pairs = [(0, [0, 1, 2, 3]), (2, [0, 3]), (3, [0, 1, 2, 3])]
        scores = [mine.scores(n) for n, _ in pairs], [theirs.scores(n)[:, heads] for n, heads in pairs]
        assert found == pytest.approx(float(losses.attention_scores(*scores, MASK)))
    cut_heads(student, {3: []})
    with pytest.raises(StepError, match="an attention in the last layers for relation_weight, got none"):
        imitation(student, teacher, settings(relation_weight=1.0), seed=0)
    cut_heads(student, {0: [], 2: []})
    with pytest.raises(StepError, match="a student with an attention for attention_weight, got none in any block"):
        imitation(student, teacher, settings(attention_weight=1.0), seed=0)


def settings(**changes: object) -> DistillSettings:
    return DistillSettings(**{"relation_heads": 4, **changes})  # type: ignore[arg-type]


def seen_by_hand(student: Bundle, teacher: Bundle, layers: list[int], teacher_layers: list[int]) -> dict[str, float]:
    """Each loss from transformers' own hidden states and linears called by themselves."""
    found: dict[str, float] = {}
    states, entries, scores, parts = [], [], [], []
    for who, chosen in ((student, layers), (teacher, teacher_layers)):
        with torch.no_grad():
            hidden = who.model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        stack, modules = one_stack(who)
        states.append([hidden[n + 1] for n in chosen])
        entries.append(hidden[0])
        made = []
        for n in chosen:
            linears = [modules[n].get_submodule(getattr(stack.attention[0], part)) for part in ("q", "k", "v")]
            with torch.no_grad():
                made.append([linear(hidden[n]) for linear in linears])
        parts.append(made[-1])
        heads = [[x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in (q, k)] for q, k, _ in made]
        scores.append([q @ k.transpose(-1, -2) / 8**0.5 for q, k in heads])
    identity = [torch.nn.Identity()] * len(layers)
    found["hidden"] = float(losses.hidden_states(states[0], states[1], identity, MASK))
    found["embedding"] = float(losses.hidden_states(entries[:1], entries[1:], identity[:1], MASK))
    found["attention"] = float(losses.attention_scores(scores[0], scores[1], MASK))
    found["relation"] = float(losses.relations(parts[0], parts[1], MASK, 4))
    return found


def test_every_loss_has_its_weight_and_the_sum_is_theirs(tiny: Callable[..., Path]) -> None:
    student, teacher = bundle_of(tiny, "bert"), bundle_of(tiny, "bert", seed=1)
    keep_layers_of(student, {"encoder": [0, 1]})
    by_hand = seen_by_hand(student, teacher, [0, 1], [1, 3])
    total = 0.0
    for weights in ({"hidden": 0.5}, {"embedding": 2.0}, {"attention": 0.1}, {"relation": 3.0}, None):
        some = {"hidden": 0.5, "embedding": 2.0, "attention": 0.1, "relation": 3.0} if weights is None else weights
        made = imitation(student, teacher, settings(**{f"{name}_weight": w for name, w in some.items()}), 0)
        assert made is not None
        with made.watch_student(student) as mine, made.watch_teacher() as theirs, torch.no_grad():
            for who in (student, teacher):
                who.model(input_ids=IDS, attention_mask=MASK)
        found = float(made.loss(mine, theirs, MASK))
        assert found == pytest.approx(sum(w * by_hand[name] for name, w in some.items()), rel=1e-5)
        assert found > 0
        total += found if weights is not None else -found
    assert total == pytest.approx(0, abs=1e-4)


def test_relations_are_those_of_the_last_layer_and_the_one_it_is_mapped_on(tiny: Callable[..., Path]) -> None:
    student, teacher = bundle_of(tiny, "bert"), bundle_of(tiny, "bert", seed=1)
    keep_layers_of(student, {"encoder": [0, 1]})
    made = imitation(student, teacher, settings(relation_weight=1.0), 0, (0, 2))
    assert made is not None
    with made.watch_student(student) as mine, made.watch_teacher() as theirs, torch.no_grad():
        for who in (student, teacher):
            who.model(input_ids=IDS, attention_mask=MASK)
    assert (sorted(mine.parts), sorted(theirs.parts)) == ([1], [2])
    expected = seen_by_hand(student, teacher, [1], [2])["relation"]
    assert float(made.loss(mine, theirs, MASK)) == pytest.approx(expected, rel=1e-5)


def test_relations_need_no_equal_heads_but_slices_that_divide(tiny: Callable[..., Path]) -> None:
    teacher = bundle_of(tiny, "bert")
    student = bundle_of(tiny, "bert", hidden_size=16, num_attention_heads=2)
    assert imitation(student, teacher, settings(relation_weight=1.0, relation_heads=8), 0) is not None
    with pytest.raises(
        StepError,
        match="relation_heads that divide the student's 16 and the teacher's 32, got 12; set it to 4, 8 or 16",
    ):
        imitation(student, teacher, settings(relation_weight=1.0, relation_heads=12), 0)
    cut_heads(teacher, {3: [0, 1, 2]})
    with pytest.raises(StepError, match="the student's 16 and the teacher's 24, got 16; set it to 2, 4 or 8"):
        imitation(student, teacher, settings(relation_weight=1.0, relation_heads=16), 0)
    whole = bundle_of(tiny, "bert")
    cut_heads(whole, {3: [1, 2, 3]})  # a pruned student: 24 beside 24, whatever heads
    made = imitation(whole, teacher, settings(relation_weight=1.0, attention_weight=0.0, relation_heads=3), 0)
    assert made is not None


def test_maps_are_learned_where_widths_differ_and_can_begin_at_a_basis(tiny: Callable[..., Path]) -> None:
    teacher, student = bundle_of(tiny, "bert"), bundle_of(tiny, "bert", hidden_size=16)
    weighty = settings(hidden_weight=1.0, embedding_weight=1.0)
    made = imitation(student, teacher, weighty, 3)
    assert made is not None
    assert [tuple(p.shape) for p in made.learned.parameters()] == [(32, 16)] * 5
    again = imitation(student, teacher, weighty, 3)
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(made.learned.parameters(), again.learned.parameters(), strict=True))
    basis = torch.linalg.qr(torch.randn(32, 16)).Q
    begun = imitation(student, teacher, weighty, 3, basis=basis)
    assert begun is not None
    assert all(torch.equal(p, basis) for p in begun.learned.parameters())
    alone = imitation(student, teacher, settings(embedding_weight=1.0), 3)
    assert alone is not None
    assert len(list(alone.learned.parameters())) == 1


def test_without_a_weight_there_is_nothing(tiny: Callable[..., Path]) -> None:
    bundle = bundle_of(tiny, "bert")
    assert imitation(bundle, bundle, settings(), 0) is None
    assert Weights.of(QuantizeSettings(hidden_weight=0.25)) == Weights(0.25, 0, 0, 0)


def test_models_that_these_losses_are_not_for(tiny: Callable[..., Path]) -> None:
    decoder = cases.open_bundle(tiny("gpt2", labels=LABELS))
    for name in ("attention", "relation"):
        with pytest.raises(StepError, match="encoders for attention_weight and relation_weight, got a decoder"):
            imitation(decoder, decoder, settings(**{f"{name}_weight": 1.0}), 0)
    both = cases.open_bundle(tiny("t5", labels=LABELS))
    with pytest.raises(StepError, match="one stack of blocks for embedding_weight, got encoder, decoder"):
        imitation(both, both, settings(embedding_weight=1.0), 0)


def test_gradients_reach_the_student_alone(tiny: Callable[..., Path]) -> None:
    student, teacher = bundle_of(tiny, "mpnet"), bundle_of(tiny, "mpnet", seed=1)
    made = imitation(student, teacher, settings(attention_weight=1.0, embedding_weight=1.0, relation_weight=1.0), 0)
    assert made is not None
    with made.watch_student(student) as mine:
        student.model(input_ids=IDS, attention_mask=MASK)
    with made.watch_teacher() as theirs, torch.no_grad():
        teacher.model(input_ids=IDS, attention_mask=MASK)
    made.loss(mine, theirs, MASK).backward()
    named = dict(student.model.named_parameters())
    touched = {name for name, p in named.items() if p.grad is not None and float(p.grad.abs().max()) > 0}
    assert {"mpnet.encoder.layer.3.attention.attn.q.weight", "mpnet.encoder.relative_attention_bias.weight"} <= touched
    assert not any("classifier" in name for name in touched)
    assert all(p.grad is None for p in teacher.model.parameters())
    np.testing.assert_array_equal(list(made.student_layers), range(4))
