"""An exported file answers as torch does, or the export fails.

Error of one example: |engine - torch| / max(|torch|, median |torch|), Euclidean norms over its whole answer (the median
keeps an answer near zero from making a small difference look large).

fp32, weights only: every example within EXACT. Measured: 6e-6 on tiny models of five families, 1e-6 on MiniLM.

int8-dynamic, -token, -static: the file with its integer arithmetic undone (`engines.onnx_twin`) within EXACT of torch without
rounded activations (static: with biases rounded as there); and the file itself within FLIPS of torch with simulated
rounding, or within FLIPS_SHARE of what the rounding as such changes, at the median. On MiniLM a few values a text fall on the
other side of a rounding edge, which moves the answer by .006 at the median and by .12 at worst, as much as the rounding
itself does.

weights-only-int8-compute: the file's twin without that rounding within EXACT of torch; the file itself within BLOCK_ROUNDING at
the median. Measured: .02 on MiniLM, whose inputs are rounded in blocks of 32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flyweight.artifact import Engine
from flyweight.engines.engine import Arrays, Predictor
from flyweight.errors import ExportError

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle

__all__ = ["BLOCK_ROUNDING", "EXACT", "FLIPS", "FLIPS_SHARE", "check", "relative_errors"]

EXACT = 5e-4
FLIPS = 0.01
FLIPS_SHARE = 1.5
BLOCK_ROUNDING = 0.1

Answers = NDArray[np.float32]


def check(bundle: Bundle, folder: Path, engine: Engine, arrays: Sequence[Arrays], runner: str = "onnxruntime") -> float:
    """Largest error over the examples of `arrays` (batches as the engine takes them, of several lengths).

    runner: what runs the file, "onnxruntime" or "openvino".
    Raises ExportError with the numbers when the tolerance of `engine.precision` is exceeded.
    """
    from flyweight.models.activations import rounded_biases

    if not arrays:
        raise ExportError("at least one batch to compare the engine with torch on", "none")
    path = Path(folder) / engine.file
    torch_answers = _torch(bundle, arrays)
    errors = relative_errors(_file(path, arrays, runner), torch_answers)
    if "int8-" not in engine.precision:
        _hold(errors.max(), EXACT, f"largest error of {engine.file}")
        return float(errors.max())
    with rounded_biases(bundle):
        floats = _torch(replace(bundle, activations="none"), arrays)
    with tempfile.TemporaryDirectory() as temporary:
        _hold(
            relative_errors(_file(_twin(path, Path(temporary)), arrays, runner), floats).max(),
            EXACT,
            f"largest error of {engine.file} without integer arithmetic",
        )
    if engine.precision == "weights-only-int8-compute":
        _hold(np.median(errors), BLOCK_ROUNDING, f"median error of {engine.file}")
        return float(errors.max())
    rounding = float(np.median(relative_errors(torch_answers, floats)))
    _hold(np.median(errors), max(FLIPS, FLIPS_SHARE * rounding), f"median error of {engine.file}")
    return float(errors.max())


def relative_errors(found: Answers, wanted: Answers) -> NDArray[np.float64]:
    """One error an example, [n]; see the top of this file. Answers are [n, ...]."""
    if found.shape != wanted.shape:
        raise ExportError(f"answers of shape {wanted.shape}", f"{found.shape}", "report this model")
    flat = found.reshape(len(found), -1).astype(np.float64), wanted.reshape(len(wanted), -1).astype(np.float64)
    size = np.linalg.norm(flat[1], axis=-1)
    return np.asarray(np.linalg.norm(flat[0] - flat[1], axis=-1) / np.maximum(size, max(np.median(size), 1e-12)))


def _hold(error: float, tolerance: float, what: str) -> None:
    if not error <= tolerance:  # also for NaN
        raise ExportError(
            f"{what} against torch of at most {tolerance:.1e}",
            f"{error:.1e}",
            "the engine does not compute this model: report it (int8 on a CPU without VNNI: take fewer bits)",
        )


def _twin(path: Path, folder: Path) -> Path:
    from flyweight.engines.onnx_twin import write_float_twin

    write_float_twin(path, folder / "twin.onnx")
    return folder / "twin.onnx"


def _file(path: Path, arrays: Sequence[Arrays], runner: str) -> Answers:
    from flyweight.engines import onnxruntime, openvino

    return _answers((openvino if runner == "openvino" else onnxruntime).open_file(path), arrays)


def _torch(bundle: Bundle, arrays: Sequence[Arrays]) -> Answers:
    from flyweight.engines.torch import predictor

    return _answers(predictor(bundle), arrays)


def _answers(model: Predictor, arrays: Sequence[Arrays]) -> Answers:
    try:
        return np.concatenate([model.run(batch) for batch in arrays])
    finally:
        model.close()
