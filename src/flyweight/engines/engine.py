"""The one seam to whatever runs a model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from flyweight.errors import SettingsError, nearest

__all__ = ["ENGINES", "EngineModule", "Predictor", "engine_named"]

Arrays = dict[str, NDArray[np.int64]]


class Predictor(Protocol):
    """A model ready to run."""

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """input_ids, attention_mask, token_type_ids (unused ones are ignored), each [batch, length] -> [batch, ...]."""

    def close(self) -> None:
        """Give memory and threads back."""


class EngineModule(Protocol):
    """What a file in this folder offers at module level."""

    def available(self) -> str | None:
        """None when the engine can run here, else the reason why not."""

    def open(self, folder: Path, threads: int = 1) -> Predictor:
        """Load the engine's file of an artifact. Raises EngineError, ArtifactError."""


# `export(bundle, folder)` of an engine that has a form of its own stands in its file too, and needs torch.
ENGINES = {
    "onnxruntime": "flyweight.engines.onnxruntime",
    "openvino": "flyweight.engines.openvino",
    "torch": "flyweight.engines.torch",
}


def engine_named(name: str) -> EngineModule:
    """Raises SettingsError listing the known engines."""
    if name not in ENGINES:
        raise SettingsError("an engine", f"'{name}'{nearest(name, ENGINES)}", f"known: {', '.join(ENGINES)}")
    return cast(EngineModule, importlib.import_module(ENGINES[name]))
