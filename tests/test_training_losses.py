"""What a student is compared by, against the formulas written out over plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="distillation needs the extra `compress`")

from flyweight.training import losses  # noqa: E402
from flyweight.training.teacher import top  # noqa: E402

TEACHER = [[2.0, -1.0, 0.3], [0.5, 0.25, -2.0], [-3.0, 1.0, 1.5], [0.1, 0.2, 0.9]]
STUDENT = [[0.3, 0.1, -0.4], [-1.0, 2.0, 0.5], [0.0, 0.7, -1.2], [1.0, -0.5, 0.25]]

Rows = list[list[float]]


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    shares = [math.exp(value / temperature) for value in row]
    return [share / sum(shares) for share in shares]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def correlation(x: list[float], y: list[float]) -> float:
    mx, my = sum(x) / len(x), sum(y) / len(y)
    both = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return both / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def kind_by_hand(kind: str, p: list[float], q: list[float]) -> float:
    if kind == "reverse":
        return kl(q, p)
    if kind == "skew":
        return kl(p, [0.1 * a + 0.9 * b for a, b in zip(p, q, strict=True)])
    return kl(p, q)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kind", ["forward", "reverse", "skew"])
def test_divergences_by_hand(kind: losses.Kind, temperature: float) -> None:
    pairs = [
        (softmax(wanted, temperature), softmax(given, temperature))
        for wanted, given in zip(TEACHER, STUDENT, strict=True)
    ]
    expected = temperature**2 * sum(kind_by_hand(kind, p, q) for p, q in pairs) / len(pairs)
    found = losses.soft_targets(torch.tensor(STUDENT), torch.tensor(TEACHER), temperature, kind)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(losses.soft_targets(torch.tensor(TEACHER), torch.tensor(TEACHER), temperature, kind)) == pytest.approx(
        0, abs=1e-6
    )


def test_divergences_of_one_pair_to_the_last_digit() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): forward .1308120, reverse 1/2 ln(2/3) + 1/2 ln 2 = .1438410, and skew against
    (.525, .475): 3/4 ln(.75/.525) + 1/4 ln(.25/.475) = .1070430."""
    wanted, given = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = {"forward": 0.1308120, "reverse": 0.1438410, "skew": 0.75 * math.log(0.75 / 0.525)}
    expected["skew"] += 0.25 * math.log(0.25 / 0.475)
    for kind, value in expected.items():
        assert float(losses.soft_targets(given, wanted, 1.0, kind)) == pytest.approx(value, abs=1e-6)


def test_skew_is_bounded_where_forward_is_not_and_their_gradients_are_finite() -> None:
    wanted, given = torch.tensor([[60.0, -60.0]]), torch.tensor([[-60.0, 60.0]], requires_grad=True)
    assert float(losses.soft_targets(given.detach(), wanted, 1.0)) == pytest.approx(120.0, rel=1e-5)
    for kind in ("forward", "reverse", "skew"):
        found = losses.soft_targets(given, wanted, 1.0, kind)
        (gradient,) = torch.autograd.grad(found, given)
        assert bool(torch.isfinite(gradient).all())
    assert float(found.detach()) == pytest.approx(math.log(10.0), rel=1e-5)


@pytest.mark.parametrize("kind", ["forward", "reverse", "skew"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_classes_with_the_rest_as_one_more(kind: losses.Kind, temperature: float) -> None:
    """By hand with the classes merged; all classes give the whole divergence, fewer never more, and one more never less."""
    generator = torch.Generator().manual_seed(0)
    wanted, given = torch.randn(2, 7, 9, generator=generator, dtype=torch.float64).mul(2).float()
    whole = float(losses.soft_targets(given, wanted, temperature, kind))
    last = 0.0
    for k in range(1, 10):
        values, indices, rest = top(wanted, k, temperature)
        found = float(losses.top_targets(given, values, indices, rest, temperature, kind))
        expected = 0.0
        for row in range(7):
            p, q = (softmax(x[row].tolist(), temperature) for x in (wanted, given))
            best = sorted(range(9), key=lambda i, p=p: -p[i])[:k]
            merged = [[x[i] for i in best] + ([sum(x) - sum(x[i] for i in best)] if k < 9 else []) for x in (p, q)]
            expected += temperature**2 * kind_by_hand(kind, *merged) / 7
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert last - 1e-6 <= found <= whole + 1e-6
        last = found
    assert last == pytest.approx(whole, rel=1e-5)
    values, indices, rest = top(wanted, 8, temperature)
    torch.testing.assert_close(values.exp().sum(-1) + rest.exp(), torch.ones(7))


def test_top_classes_have_gradients_for_the_rest_as_well() -> None:
    given = torch.zeros(1, 4, requires_grad=True)
    losses.top_targets(given, *top(torch.tensor([[3.0, 1.0, 0.0, 0.0]]), 1, 1.0), 1.0).backward()
    # d/dlogit KL = student - teacher, where of the merged classes each has its part by the student's shares
    p = softmax([3.0, 1.0, 0.0, 0.0])[0]
    np.testing.assert_allclose(given.grad.numpy(), [[0.25 - p] + [0.25 - (1 - p) / 3] * 3], rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_token_targets_by_hand(causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    given, wanted = torch.randn(2, 2, 4, 5, generator=generator)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    places = [(0, 0), (0, 1), (1, 0)] if causal else [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    pairs = [(softmax(wanted[at].tolist(), 2.0), softmax(given[at].tolist(), 2.0)) for at in places]
    expected = 4.0 * sum(kl(p, q) for p, q in pairs) / len(pairs)
    found = losses.token_targets(given, wanted, mask, 2.0, causal=causal)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(losses.token_targets(given, wanted, torch.zeros(2, 4), 2.0, causal=causal)) == 0.0


def test_token_targets_of_a_causal_model(tiny: Callable[..., Path]) -> None:
    """On GPT-2's own logits: padding on the right changes nothing, and what a masked prompt foretells does not count."""
    transformers = pytest.importorskip("transformers")
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = transformers.AutoConfig.from_pretrained(tiny("gpt2"))
        models.append(transformers.AutoModelForCausalLM.from_config(config).eval())
    ids = torch.tensor([[5, 9, 11, 7, 30]])
    padded = torch.cat([ids, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        given, wanted = (model(ids).logits for model in models)
        more = [model(padded, attention_mask=mask).logits for model in models]
    whole = losses.token_targets(given, wanted, torch.ones(1, 5), 1.0)
    assert float(losses.token_targets(*more, mask, 1.0)) == pytest.approx(float(whole), rel=1e-4)
    rows = [kl(softmax(wanted[0, t].tolist()), softmax(given[0, t].tolist())) for t in range(5)]
    assert float(whole) == pytest.approx(sum(rows[:4]) / 4, rel=1e-4)
    answer = losses.token_targets(given, wanted, torch.tensor([[0, 0, 0, 1, 1]]), 1.0)  # tokens 3 and 4 are learned
    assert float(answer) == pytest.approx((rows[2] + rows[3]) / 2, rel=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_dist_by_hand(temperature: float) -> None:
    given, wanted = ([softmax(row, temperature) for row in rows] for rows in (STUDENT, TEACHER))
    rows = [correlation(a, b) for a, b in zip(given, wanted, strict=True)]
    columns = [
        correlation(list(a), list(b)) for a, b in zip(zip(*given, strict=True), zip(*wanted, strict=True), strict=True)
    ]
    expected = temperature**2 * ((1 - sum(rows) / 4) + (1 - sum(columns) / 3))
    found = losses.dist(torch.tensor(STUDENT), torch.tensor(TEACHER), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_dist_asks_for_order_and_not_for_size() -> None:
    """A row that is a rising linear function of the teacher's counts as the same; two classes are alike or opposite."""
    wanted = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3]]).log()
    softer = (0.5 * wanted.exp() + 0.5 / 3).log()
    assert float(losses.dist(softer, wanted, 1.0)) == pytest.approx(0, abs=1e-5)
    assert float(losses.soft_targets(softer, wanted, 1.0)) > 0.01
    for mine, expected in (([[1.0, 0.0]], 0.0), ([[0.0, 1.0]], 2.0)):  # one row: no columns to compare
        assert float(losses.dist(torch.tensor(mine), torch.tensor([[3.0, 0.0]]), 1.0)) == pytest.approx(
            expected, abs=1e-4
        )
    flat = torch.zeros(4, 3, requires_grad=True)
    losses.dist(flat, torch.tensor(TEACHER), 1.0).backward()
    assert bool(torch.isfinite(flat.grad).all())


def test_logits_by_hand() -> None:
    expected = sum((a - b) ** 2 for x, y in zip(STUDENT, TEACHER, strict=True) for a, b in zip(x, y, strict=True)) / 12
    assert float(losses.logits(torch.tensor(STUDENT), torch.tensor(TEACHER))) == pytest.approx(expected, rel=1e-6)


def test_attention_scores_by_hand_leave_padding_out() -> None:
    """Two heads, two real tokens of three: four pairs a head count, whatever stands in the others."""
    mine = torch.tensor([[[[1.0, 2, 9], [3, 4, 9], [9, 9, 9]], [[0, 0, 9], [0, 1, 9], [9, 9, 9]]]])
    theirs = torch.tensor([[[[1.0, 0, -5], [3, 4, -5], [-5, -5, -5]], [[1, 0, -5], [0, 4, -5], [-5, -5, -5]]]])
    found = losses.attention_scores([mine], [theirs], torch.tensor([[1, 1, 0]]))
    assert float(found) == pytest.approx((4 + (1 + 9)) / 8)
    both = losses.attention_scores([mine, theirs], [theirs, theirs], torch.tensor([[1, 1, 0]]))
    assert float(both) == pytest.approx((4 + (1 + 9)) / 8 / 2)


def relation_by_hand(vectors: Rows, start: int, size: int) -> Rows:
    parts = [row[start : start + size] for row in vectors]
    return [softmax([sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(size) for y in parts]) for x in parts]


@pytest.mark.parametrize("heads", [1, 2])
def test_relations_by_hand(heads: int) -> None:
    """Widths 2 and 4, two texts of three and of two tokens: every slice and every real token counts the same."""
    generator = torch.Generator().manual_seed(2)
    mine = list(torch.randn(3, 2, 3, 2, generator=generator))
    theirs = list(torch.randn(3, 2, 3, 4, generator=generator))
    mask, lengths = torch.tensor([[1, 1, 1], [1, 1, 0]]), (3, 2)
    expected = 0.0
    for given, wanted in zip(mine, theirs, strict=True):
        rows = [
            kl(p, q)
            for text, length in enumerate(lengths)
            for head in range(heads)
            for p, q in zip(
                relation_by_hand(wanted[text, :length].tolist(), head * 4 // heads, 4 // heads),
                relation_by_hand(given[text, :length].tolist(), head * 2 // heads, 2 // heads),
                strict=True,
            )
        ]
        expected += sum(rows) / len(rows)
    assert float(losses.relations(mine, theirs, mask, heads)) == pytest.approx(expected, rel=1e-5)
    loose = [part.clone().requires_grad_() for part in mine]
    losses.relations(loose, theirs, mask, heads).backward()
    assert all(bool(torch.isfinite(part.grad).all()) for part in loose)
    assert all(float(part.grad[1, 2].abs().max()) == 0.0 for part in loose)  # padding
    assert float(losses.relations(theirs, theirs, mask, heads)) == pytest.approx(0, abs=1e-6)
