"""Torch as an engine: the yardstick of parity, and what runs a model that no other engine takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flyweight.engines.engine import Arrays, Predictor
from flyweight.errors import EngineError
from flyweight.extras import need
from flyweight.tasks import task_named

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle

__all__ = ["available", "open", "predictor"]


def available() -> str | None:
    for module in ("torch", "transformers"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    return None


def open(folder: Path, threads: int = 1) -> Predictor:
    """Rebuild the model of an artifact. Raises ArtifactError, ModelError, MissingExtra."""
    need("torch", "run a model in torch")
    from flyweight.models.storage import restore

    return predictor(restore(folder), threads)


def predictor(bundle: Bundle, threads: int = 1) -> Predictor:
    """Ask a model in hand, on the device where it is.

    Where the bundle's activations are dynamic, their rounding is simulated: answers are those of an integer engine, the
    speed is not. Torch has one number of threads a process: each run sets it and gives it back.
    """
    return _Predictor(bundle, threads)


class _Predictor:
    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._bundle: Bundle | None = bundle
        self._task = task_named(bundle.task)
        self._threads = threads

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """Raises EngineError when an input is missing."""
        import torch

        from flyweight.models.activations import simulate

        bundle = self._bundle
        if bundle is None:
            raise EngineError("an open model", "a closed one", "open it again")
        missing = [name for name in bundle.family.inputs if name not in arrays]
        if missing:
            raise EngineError(f"the inputs {', '.join(bundle.family.inputs)}", f"none called {', '.join(missing)}")
        batch = {name: torch.as_tensor(arrays[name], device=bundle.device) for name in bundle.family.inputs}
        threads, training = torch.get_num_threads(), bundle.model.training
        torch.set_num_threads(self._threads)
        bundle.model.train(False)
        try:
            with torch.inference_mode(), simulate(bundle):
                answer: NDArray[np.float32] = self._task.answer(bundle.model(**batch), batch).float().cpu().numpy()
        finally:
            bundle.model.train(training)
            torch.set_num_threads(threads)
        return answer

    def close(self) -> None:
        self._bundle = None
