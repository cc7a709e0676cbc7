"""One label for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flyweight.data import Examples, Row, pack
from flyweight.errors import DataError, nearest
from flyweight.tasks.task import Array
from flyweight.tokenization import Encoder

if TYPE_CHECKING:
    from torch import Tensor


def label_text(value: Any) -> str:
    """Labels are compared as text: 1, 1.0 (as pandas writes it) and "1" are one class."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


class TextClassification:
    """Accuracy and macro-averaged F1; outputs are logits [n, classes]."""

    name = "text-classification"
    labelled = True
    auto = "AutoModelForSequenceClassification"
    output = "logits"
    metric = "accuracy"

    def label_names(self, found: Iterable[Any]) -> tuple[str, ...] | None:
        names = {label_text(value) for value in found}
        if len(names) < 2:
            raise DataError("at least two classes in the labels", f"only {sorted(names)}", "check the label column")
        if all(name.lstrip("-").isdigit() for name in names):
            return tuple(sorted(names, key=int))
        return tuple(sorted(names))

    def encode(self, rows: Iterable[Row], encoder: Encoder, labels: Sequence[str] | None) -> Examples:
        number = {name: i for i, name in enumerate(labels or ())}
        if all(name == f"LABEL_{i}" for name, i in number.items()):  # a model that names its classes by number alone
            number |= {str(i): i for i in number.values()}
        encoded, classes = [], []
        for row, ids in encoder.stream(rows):
            encoded.append(ids)
            if labels is None or row.label is None:
                continue
            name = label_text(row.label)
            if name not in number:
                known = ", ".join(map(repr, labels[:20]))
                raise DataError(
                    f"one of the model's labels ({known}) at {row.where}",
                    f"'{name}'{nearest(name, number)}",
                    "mend the row, or train with this label",
                )
            classes.append(number[name])
        return pack(encoded, classes or None)

    def scores(self, outputs: Array, examples: Examples) -> Array:
        right: Array = (outputs.argmax(-1) == examples.labels).astype(np.float32)
        return right

    def metrics(self, outputs: Array, examples: Examples) -> dict[str, float]:
        assert examples.labels is not None
        predicted = outputs.argmax(-1)
        return {
            "accuracy": float((predicted == examples.labels).mean()),
            "macro_f1": macro_f1(predicted, examples.labels, outputs.shape[-1]),
        }

    def decode(self, outputs: Array, labels: Sequence[str] | None) -> list[Any]:
        shifted = np.exp(outputs - outputs.max(-1, keepdims=True))
        shares = shifted / shifted.sum(-1, keepdims=True)
        names = labels or [f"LABEL_{i}" for i in range(outputs.shape[-1])]
        return [
            [{"label": names[i], "score": float(row[i])} for i in np.argsort(-row, kind="stable")] for row in shares
        ]

    def answer(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = output.logits
        return logits.float()

    def loss(self, answer: Tensor, labels: Tensor) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(answer, labels)


def macro_f1(predicted: Any, labels: Any, classes: int) -> float:
    """Mean over the classes that occur of 2 TP / (2 TP + FP + FN)."""
    pairs = np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)
    right, total = np.diag(pairs), pairs.sum(0) + pairs.sum(1)
    occurs = total > 0
    return float((2 * right[occurs] / total[occurs]).mean())


TASK = TextClassification()
