"""Vectorised bootstrap against a slow loop over the same samples; answers in order; paired differences."""

from __future__ import annotations

import numpy as np
import pytest

from flyweight.data import Examples, pack
from flyweight.engines.engine import Arrays
from flyweight.measure import quality as module
from flyweight.measure.quality import answers, difference, quality, resamples
from flyweight.tasks import task_named

CLASSIFY = task_named("text-classification")
EMBED = task_named("embedding")


def labelled(n: int, classes: int, seed: int = 0) -> tuple[Examples, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, n)
    outputs = generator.normal(size=(n, classes)).astype(np.float32)
    outputs[np.arange(n), labels] += 1.0
    encoded = [(list(range(1, 2 + int(k))), None) for k in generator.integers(1, 9, n)]
    return pack(encoded, labels), outputs


def slow(task: object, outputs: np.ndarray, examples: Examples, seed: int, number: int) -> dict[str, list[float]]:
    """The definition: draw n rows with replacement, take them, ask the task."""
    generator = np.random.default_rng(seed)
    found: dict[str, list[float]] = {}
    for _ in range(number):
        rows = generator.integers(0, len(examples), len(examples))
        for name, value in task.metrics(outputs[rows], examples.take(rows)).items():  # type: ignore[attr-defined]
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("chunk", [2**21, 100])
@pytest.mark.parametrize("classes", [2, 5])
def test_classification_equals_the_slow_loop(classes: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    examples, outputs = labelled(37, classes)
    fast = resamples(CLASSIFY, outputs, examples, seed=3, number=60)
    assert fast.keys() == {"accuracy", "macro_f1"}
    for name, values in slow(CLASSIFY, outputs, examples, 3, 60).items():
        np.testing.assert_allclose(fast[name], values, rtol=1e-6)


def test_a_class_that_a_sample_misses_is_left_out_as_in_the_task() -> None:
    examples, outputs = labelled(6, 4)  # samples of six often miss one of four classes
    fast = resamples(CLASSIFY, outputs, examples, seed=1, number=80)
    np.testing.assert_allclose(fast["macro_f1"], slow(CLASSIFY, outputs, examples, 1, 80)["macro_f1"])


def test_embedding_equals_the_slow_loop() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(50, 8)).astype(np.float32)
    examples = pack([([1, 2], None)] * 50, None)
    examples = Examples(examples.ids, None, examples.starts, vectors + 0.3 * generator.normal(size=(50, 8)))
    fast = resamples(EMBED, vectors, examples, seed=2, number=40)
    for name, values in slow(EMBED, vectors, examples, 2, 40).items():
        np.testing.assert_allclose(fast[name], values, rtol=1e-5)


class Other:
    """A task with a metric that has no fast way."""

    metric = "right"

    def scores(self, outputs: np.ndarray, examples: Examples) -> np.ndarray:
        return (outputs.argmax(-1) == examples.labels).astype(np.float32)

    def metrics(self, outputs: np.ndarray, examples: Examples) -> dict[str, float]:
        lengths = examples.lengths
        return {
            "right": float(self.scores(outputs, examples).mean()),
            "by_token": float((self.scores(outputs, examples) * lengths).sum() / lengths.sum()),
        }


def test_an_unknown_metric_is_taken_sample_by_sample() -> None:
    examples, outputs = labelled(20, 2)
    fast = resamples(Other(), outputs, examples, seed=0, number=30)  # type: ignore[arg-type]
    for name, values in slow(Other(), outputs, examples, 0, 30).items():
        np.testing.assert_allclose(fast[name], values, rtol=1e-6)


def test_figures_and_their_interval() -> None:
    examples, outputs = labelled(400, 2)
    sampled = resamples(CLASSIFY, outputs, examples)
    figure = quality(CLASSIFY, outputs, examples, sampled)["quality.accuracy"]
    assert figure.value == pytest.approx(float((outputs.argmax(-1) == examples.labels).mean()))
    assert figure.n == 400
    assert figure.low is not None
    assert figure.high is not None
    wide = 1.96 * np.sqrt(figure.value * (1 - figure.value) / 400)  # the normal approximation
    assert figure.low == pytest.approx(figure.value - wide, abs=0.008)
    assert figure.high == pytest.approx(figure.value + wide, abs=0.008)


def test_the_difference_is_paired() -> None:
    examples, outputs = labelled(500, 2)
    worse = outputs.copy()
    worse[:5] = worse[:5, ::-1]
    parts = [resamples(CLASSIFY, one, examples, seed=4) for one in (worse, outputs)]
    figures = [quality(CLASSIFY, one, examples, part) for one, part in zip((worse, outputs), parts, strict=True)]
    found = difference(figures[0], figures[1], parts[0], parts[1], "reference")["quality.accuracy.difference"]
    assert found.value == pytest.approx(figures[0]["quality.accuracy"].value - figures[1]["quality.accuracy"].value)
    own = figures[0]["quality.accuracy"]
    assert own.low is not None
    assert own.high is not None
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < (own.high - own.low) / 3  # five rows differ: most of the noise is shared
    same = difference(figures[1], figures[1], parts[1], parts[1], "reference")["quality.accuracy.difference"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


class Echo:
    """Answers with the sum of the unmasked ids of each row."""

    def run(self, arrays: Arrays) -> np.ndarray:
        return (arrays["input_ids"] * arrays["attention_mask"]).sum(1, keepdims=True).astype(np.float32)

    def close(self) -> None: ...


def test_answers_come_in_the_order_of_the_examples() -> None:
    examples, _ = labelled(45, 2, seed=9)
    sums = [examples.ids[a:b].sum() for a, b in zip(examples.starts, examples.starts[1:], strict=False)]
    np.testing.assert_array_equal(answers(Echo(), examples, pad=0, batch_size=7)[:, 0], sums)


def test_many_classes_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of classes x classes for each of 2,000 samples at once would be 16 GB at 1,000 classes."""
    largest, real = 0, module._macro_f1

    def watched(outputs: np.ndarray, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
        nonlocal largest
        largest = max(largest, len(rows) * outputs.shape[1] ** 2)
        return real(outputs, labels, rows)

    monkeypatch.setattr(module, "_macro_f1", watched)
    examples, outputs = labelled(50, 300)
    assert len(resamples(CLASSIFY, outputs, examples, number=200)["macro_f1"]) == 200
    assert largest <= module.CHUNK
