"""The default engine: onnxruntime on the artifact's onnx/model.onnx. Running needs no torch; exporting does."""

from __future__ import annotations

import base64
import functools
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flyweight import artifact
from flyweight.engines.engine import Arrays, Predictor
from flyweight.errors import EngineError

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle

__all__ = ["available", "export", "open", "open_file", "saturates", "session_options"]

NAME = "onnxruntime"


def available() -> str | None:
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    return None


def export(bundle: Bundle, folder: Path) -> artifact.Engine:
    """Write the bundle's ONNX file below `folder`; see `flyweight.engines.onnx_export`. Raises ExportError."""
    from flyweight.engines.onnx_export import export as write

    return write(bundle, folder)


def open(folder: Path, threads: int = 1) -> Predictor:
    """Load the file that the manifest of `folder` names. Raises ArtifactError, EngineError.

    Hashes are not checked here: `flyweight.artifact.verify` does that once, before anything is opened.
    """
    manifest = artifact.read_manifest(folder)
    entry = manifest.engines.get(NAME)
    if entry is None:
        has = ", ".join(manifest.engines) or "no engine's file"
        raise EngineError(f"an ONNX file in {folder}", has, "run `flyweight export` on it, or use engine torch")
    return open_file(Path(folder) / entry.file, threads)


def open_file(path: Path, threads: int = 1) -> Predictor:
    """Load any ONNX file whose first output is the answer. Raises EngineError."""
    reason = available()
    if reason:
        raise EngineError("the engine onnxruntime", reason, "pip install onnxruntime")
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    try:
        session = onnxruntime.InferenceSession(str(path), session_options(threads), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no class of their own
        raise EngineError(
            f"an ONNX file that onnxruntime {onnxruntime.__version__} runs at {path}", f"'{error}'"
        ) from None
    return _Predictor(session)


def session_options(threads: int) -> Any:
    """Latency of one request at a time: operators one after another, each on `threads` cores.

    Waiting threads spin within a run (it saves milliseconds with small operators) and stop when it ends, so that an idle
    model burns no CPU and does not disturb another one. Where the fast int8 kernel would be wrong, the exact, slower
    one is asked for; onnxruntime then takes it for those weights alone that lie outside -64..64.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3  # errors only
    return options


# MatMulInteger of a [4, 16] uint8 and b [16, 16] int8, as an ONNX file: onnx itself is not there where models only run.
PROBE = (
    "CAg6XAoYCgFhCgFiEgF5Ig1NYXRNdWxJbnRlZ2VyEgFnWhMKAWESDgoMCAISCAoCCAQKAggQWhMKAWISDgoMCAMSCAoCCBAKAggQ"
    "YhMKAXkSDgoMCAYSCAoCCAQKAggQQgQKABAR"
)


@functools.cache
def saturates() -> bool:
    """Whether this CPU's int8 kernel adds two u8 x s8 products in 16 bits, which is too few (x64 without VNNI).

    Found by multiplying the largest numbers, not by the CPU's flags: reading those is different on every system.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(base64.b64decode(PROBE), providers=["CPUExecutionProvider"])
    found = session.run(None, {"a": np.full((4, 16), 255, np.uint8), "b": np.full((16, 16), 127, np.int8)})[0]
    return bool((found != 16 * 255 * 127).any())


class _Predictor:
    def __init__(self, session: Any) -> None:
        self._session = session
        self._inputs = tuple(value.name for value in session.get_inputs())
        self._output = session.get_outputs()[0].name

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """Raises EngineError when an input is missing or the model cannot take the arrays."""
        if self._session is None:
            raise EngineError("an open model", "a closed one", "open it again")
        missing = [name for name in self._inputs if name not in arrays]
        if missing:
            raise EngineError(f"the inputs {', '.join(self._inputs)}", f"none called {', '.join(missing)}")
        try:
            found: NDArray[np.float32] = self._session.run([self._output], {n: arrays[n] for n in self._inputs})[0]
        except Exception as error:
            raise EngineError("arrays that the model can take", f"'{error}'", "check ids and lengths") from None
        return found

    def close(self) -> None:
        self._session = None
