"""An artifact in use: texts in, answers out. Needs neither torch nor transformers (unless the engine is torch)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from flyweight import artifact
from flyweight.artifact import Manifest
from flyweight.data import Examples, pack
from flyweight.engines.engine import Predictor, engine_named
from flyweight.errors import DataError, EngineError
from flyweight.tasks import Task, task_named
from flyweight.tokenization import Encoder, open_encoder

__all__ = ["Session", "Text", "neutral_batch", "open_model"]

Text = str | tuple[str, str]


class Session:
    """A model ready for texts. Close it, or use it in a `with` block."""

    def __init__(self, manifest: Manifest, encoder: Encoder, predictor: Predictor) -> None:
        self.manifest, self.encoder, self.predictor = manifest, encoder, predictor
        self.task: Task = task_named(manifest.task)

    @property
    def batch_size(self) -> int:
        """Texts that may share a batch: 1 where activations are rounded by the range of the whole batch, else 32."""
        return neutral_batch(self.manifest.activations)

    def predict(self, texts: Sequence[Text], batch_size: int | None = None) -> list[Any]:
        """One JSON answer a text or pair, in their order. Raises DataError naming the text that is empty or too long."""
        if not texts:
            return []
        named = [_named(number, text) for number, text in enumerate(texts, 1)]
        outputs = self.outputs(pack(self.encoder.encode(named), None), batch_size)
        return self.task.decode(outputs, self.manifest.labels)

    def outputs(self, examples: Examples, batch_size: int | None = None) -> NDArray[np.float32]:
        """Raw outputs [n, ...] in the order of the examples; texts of like length share a batch, so that little is padding."""
        if not len(examples):
            raise DataError("at least one text", "none")
        batch_size = batch_size or self.batch_size
        order = np.argsort(examples.lengths, kind="stable")
        parts = [
            self.predictor.run(examples.batch(order[start : start + batch_size], self.encoder.pad))
            for start in range(0, len(order), batch_size)
        ]
        joined = np.concatenate(parts)
        answers = np.empty_like(joined)
        answers[order] = joined
        return answers

    def close(self) -> None:
        self.predictor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def neutral_batch(activations: str) -> int:
    """The largest batch in which the answer to a text does not depend on its neighbours, up to 32."""
    return 1 if activations == "dynamic" else 32


def open_model(path: Path | str, engine: str = "onnxruntime", threads: int = 1, truncate: bool = False) -> Session:
    """Open an artifact, after checking the hash of every file in it.

    truncate: cut texts that are longer than the model's limit; otherwise they are refused. Raises ArtifactError (not an
    artifact, or a damaged one), EngineError (the engine is not here, or has no file in it), SettingsError (unknown engine).
    """
    module, folder = engine_named(engine), Path(path)
    reason = module.available()
    if reason:
        raise EngineError(f"the engine {engine}", reason, "choose another --engine or install it")
    manifest = artifact.verify(folder)
    encoder = open_encoder(folder, manifest.pad_token_id, manifest.max_length, truncate)
    return Session(manifest, encoder, module.open(folder, threads))


def _named(number: int, text: Text) -> tuple[str, str, str | None]:
    first, second = (text, None) if isinstance(text, str) else text
    if not first.strip():
        raise DataError(f"words in text {number}", "an empty text", "leave it out")
    return f"text {number}", first, second
