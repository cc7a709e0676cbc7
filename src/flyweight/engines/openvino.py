"""OpenVINO on the artifact's ONNX file: the same file that onnxruntime runs, faster where a CPU has VNNI.

What OpenVINO makes of our files (seen in its runtime graph, version 2026.4):

- int8-static: QuantizeLinear and DequantizeLinear around a product become one int8 FullyConnected. This is the format for it.
- int8-dynamic, int8-token: DynamicQuantizeLinear and MatMulInteger are computed in float, exactly as written: right, not fast.
- weights only: the packed integers stay packed (3 to 8 bits) and are made float inside a float FullyConnected. Those of 1
  and 2 bits are unpacked by nodes of the graph, which it does not take: it wants constants there.

On a CPU without VNNI its int8 products saturate, and it has no exact kernel to ask for: see `saturates`.

Two of its defaults would change answers without a word, and are set here: where a CPU has bf16 it computes fp32 models in
bf16, and it rounds the inputs of linears with packed weights to int8 (in groups of 32).
"""

from __future__ import annotations

import functools
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyweight import artifact
from flyweight.engines import onnxruntime
from flyweight.engines.engine import Arrays, Predictor
from flyweight.engines.openvino_graph import prepared
from flyweight.errors import EngineError
from flyweight.extras import have, need

__all__ = ["LEAST_BITS", "PACKED", "available", "compiled", "load", "open", "open_file", "saturates", "shared_core"]

_CORES: list[Any] = []
_MAKING = threading.Lock()
PROBE = (8, 12)  # texts and tokens that static int8 is looked at on
APART = 0.05  # share of an answer that a few roundings may move it by
NAME, TELEMETRY = "openvino", "openvino_telemetry"
LEAST_BITS = 3
PACKED = f"linears of at least {LEAST_BITS} bits where inputs stay in float, as OpenVINO unpacks no fewer"
"""What it expects of weights that are packed alone."""


def available() -> str | None:
    return None if have("openvino") else 'openvino is not installed; run: pip install "flyweight[openvino]"'


def open(folder: Path, threads: int = 1) -> Predictor:
    """Load the ONNX file of an artifact. Raises ArtifactError, EngineError, MissingExtra.

    8-bit weights are refused where its kernels would be wrong (see `saturates`). Hashes are not checked here:
    `flyweight.artifact.verify` does that once, before anything is opened.
    """
    manifest = artifact.read_manifest(folder)
    entry = artifact.engine_entry(manifest, NAME)
    if entry is None:
        has = ", ".join(manifest.engines) or "no engine's file"
        raise EngineError(f"an ONNX file in {folder}", has, "use engine torch")
    wide = any(info.static and info.bits == 8 for info in manifest.quantized.values())
    if entry.precision == "int8-static" and wide and saturates():
        raise EngineError(
            "weights of at most 7 bits, as OpenVINO's int8 sums saturate on a CPU without VNNI",
            "8 bits",
            "use engine onnxruntime, which has an exact kernel, or quantize with --reduce-range on",
        )
    return open_file(Path(folder) / entry.file, threads)


def open_file(path: Path, threads: int = 1) -> Predictor:
    """Load any ONNX file whose first output is the answer. Raises EngineError, MissingExtra."""
    return _Predictor(compiled(path, threads))


def load() -> ModuleType:
    """`import openvino` without its telemetry, which otherwise reports every import. Raises MissingExtra."""
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    before = sys.modules.get(TELEMETRY)
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # "not installed": OpenVINO then takes its own empty stand-in
    try:
        return need("openvino", "run models in OpenVINO")
    finally:
        del sys.modules[TELEMETRY]
        if before is not None:
            sys.modules[TELEMETRY] = before


def shared_core() -> Any:
    """The process's only `openvino.Core`, kept until it ends. Raises MissingExtra.

    Each new one gives its thread another stack for signals and, when freed, the stack it found before: of two, the first one's,
    which is freed by then. The next signal that Python handles (Ctrl-C) ends the process with SIGSEGV (seen in 2026.4).
    """
    with _MAKING:
        if not _CORES:
            _CORES.append(load().Core())
        return _CORES[0]


def compiled(path: Path, threads: int = 1, profile: bool = False) -> Any:
    """The model on the CPU: answers of one request at a time, in the precision that the file says.

    Nothing is cached on disk. A file of static int8 is changed for speed (`prepared`), left as it is where that is answered
    wrongly, and refused where both are. profile: keep the time of every kernel. Raises EngineError, MissingExtra.
    """
    core, name = shared_core(), f"OpenVINO {load().__version__.partition('-')[0]}"
    if not Path(path).is_file():
        raise EngineError(f"an ONNX file at {path}", "no such file", "export the model again")
    options = {
        "INFERENCE_PRECISION_HINT": "f32",  # or bf16 is taken where the CPU has it
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # or inputs of packed weights are rounded to int8
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        "ENABLE_CPU_PINNING": False,  # a pinned model would fight with its neighbours for the same core
        "CACHE_DIR": "",
        "PERF_COUNT": profile,
    }
    try:
        model = core.read_model(str(path))
        rounded = any(node.get_type_name() == "FakeQuantize" for node in model.get_ordered_ops())
        found = core.compile_model(prepared(model), "CPU", options)
        if not rounded or _right(found, path):
            return found
        found = core.compile_model(core.read_model(str(path)), "CPU", options)
        if _right(found, path):
            return found
    except EngineError:
        raise
    except Exception as error:  # OpenVINO's errors are RuntimeError and its children
        reason = _reason(error)
        if "only a constant as a B input" in reason:
            raise EngineError(PACKED, "1 or 2", "use engine onnxruntime or torch") from None
        raise EngineError(
            f"an ONNX file that {name} runs at {path}",
            f"'{reason}'",
            "use engine onnxruntime, which runs all that Flyweight exports, or torch",
        ) from None
    raise EngineError(f"{name} to answer as onnxruntime does on {path}", "other answers", "use engine onnxruntime")


def _right(compiled: Any, path: Path) -> bool:
    """Whether static int8 answers as in onnxruntime, on a few made-up texts; whatever is not rounded is taken to be right.

    OpenVINO (2026.4) fuses what comes before a rounding into it, and takes the wrong axis for the channels where a linear's
    output [batch, tokens, width] is read by nothing between the two, as after ELECTRA's projection of its embeddings.
    """
    names = [value.get_any_name() for value in compiled.inputs]
    if "input_ids" not in names:
        return True
    ids = 1 + np.random.default_rng(0).integers(0, 20, PROBE)
    arrays = {name: np.ones_like(ids) if name == "attention_mask" else np.zeros_like(ids) for name in names}
    arrays["input_ids"] = ids
    other = onnxruntime.open_file(path)
    found, wanted = (one.run(arrays).reshape(len(ids), -1) for one in (_Predictor(compiled), other))
    other.close()
    distance, size = (np.linalg.norm(values, axis=1) for values in (found - wanted, wanted))
    return bool(np.median(distance) <= APART * np.median(size))


@functools.cache
def saturates() -> bool:
    """Whether OpenVINO's int8 kernel adds two u8 x s8 products in 16 bits here; unlike onnxruntime it has no exact one then.

    Found by multiplying the largest numbers.
    """
    openvino = load()
    from openvino import opset13 as op

    x = op.parameter([4, 16], np.float32)
    low, high = op.constant(np.float32(0)), op.constant(np.float32(255))
    rounded = op.fake_quantize(x, low, high, low, high, 256)
    weight = op.convert(op.constant(np.full((16, 16), 127, np.int8)), "f32")
    scaled = op.multiply(weight, op.constant(np.ones((1, 16), np.float32)))
    model = openvino.Model([op.matmul(rounded, scaled, False, False)], [x])
    compiled_probe = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled_probe(np.full((4, 16), 255, np.float32))[0]
    return bool((found != 16 * 255 * 127).any())


def _reason(error: Exception) -> str:
    """The line of OpenVINO's report that says what is wrong; the others say where in its source that was noticed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    missing = [line.removeprefix("-- ") for line in lines if line.startswith("-- No conversion rule")]
    missing += [line for line in lines if " limitation: " in line]
    said = [line for line in lines if not line.startswith(("Exception from", "Check '", "FrontEnd API"))]
    return (missing or said or lines or [type(error).__name__])[0][:300]


class _Predictor:
    def __init__(self, model: Any) -> None:
        self._request: Any = model.create_infer_request()
        self._inputs = tuple(value.get_any_name() for value in model.inputs)

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        """Raises EngineError when an input is missing or the model cannot take the arrays."""
        if self._request is None:
            raise EngineError("an open model", "a closed one", "open it again")
        missing = [name for name in self._inputs if name not in arrays]
        if missing:
            raise EngineError(f"the inputs {', '.join(self._inputs)}", f"none called {', '.join(missing)}")
        try:
            found = self._request.infer({name: np.ascontiguousarray(arrays[name]) for name in self._inputs})[0]
        except Exception as error:
            raise EngineError(
                "arrays that the model can take", f"'{_reason(error)}'", "check ids and lengths"
            ) from None
        answer: NDArray[np.float32] = np.array(found)  # the request's own memory is written anew by the next run
        return answer

    def close(self) -> None:
        self._request = None
