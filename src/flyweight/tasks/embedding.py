"""A vector for a text: mean of the last hidden states over the tokens, at length 1 (Reimers and Gurevych 2019, section 3).

Quality is judged against the reference's vectors, as mean cosine: there are no labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flyweight.data import Examples, Row, pack
from flyweight.tasks.task import Array
from flyweight.tokenization import Encoder

if TYPE_CHECKING:
    from torch import Tensor


class Embedding:
    """Outputs are unit vectors [n, hidden]; an Examples' `labels` are the reference's vectors."""

    name = "embedding"
    labelled = False
    auto = "AutoModel"
    output = "embedding"
    metric = "cosine"

    def label_names(self, found: Iterable[Any]) -> tuple[str, ...] | None:
        return None

    def encode(self, rows: Iterable[Row], encoder: Encoder, labels: Sequence[str] | None) -> Examples:
        return pack([ids for _, ids in encoder.stream(rows)], None)

    def scores(self, outputs: Array, examples: Examples) -> Array:
        assert examples.labels is not None
        norms = np.linalg.norm(outputs, axis=-1) * np.linalg.norm(examples.labels, axis=-1)
        cosine: Array = (outputs * examples.labels).sum(-1) / np.maximum(norms, 1e-12)
        return cosine

    def metrics(self, outputs: Array, examples: Examples) -> dict[str, float]:
        cosine = self.scores(outputs, examples)
        return {"cosine": float(cosine.mean()), "cosine_p1": float(np.percentile(cosine, 1))}

    def decode(self, outputs: Array, labels: Sequence[str] | None) -> list[Any]:
        return [row.tolist() for row in outputs]

    def answer(self, output: Any, batch: dict[str, Tensor]) -> Tensor:
        from torch.nn.functional import normalize

        mask = batch["attention_mask"][..., None].to(output.last_hidden_state.dtype)
        mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return normalize(mean.float(), dim=-1)

    def loss(self, answer: Tensor, labels: Tensor) -> Tensor:
        return (1 - (answer * labels).sum(-1)).mean()


TASK = Embedding()
