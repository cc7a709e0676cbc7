"""The kernels that onnxruntime ran: times from its profile, weights from the graph that it optimized the file to."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flyweight.engines.engine import Arrays
from flyweight.engines.kernels import FP32, INT8, Kernel, weights_read
from flyweight.engines.onnxruntime import available, session_options
from flyweight.errors import EngineError
from flyweight.extras import need

if TYPE_CHECKING:
    import onnx

__all__ = ["profile"]

INTEGER = {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QGemm", "QLinearMatMul"}
FLOAT = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
PRODUCTS = {*INTEGER, *FLOAT, "MatMulNBits"}
TYPES = {"float": FP32, "uint8": INT8}
END = "_kernel_time"


def profile(path: Path, arrays: Arrays, runs: int, threads: int) -> list[Kernel]:
    """Nothing is left on disk. Raises EngineError, MissingExtra (reading the optimized graph needs onnx)."""
    onnx_ = need("onnx", "read the graph that onnxruntime made")
    if reason := available():
        raise EngineError("the engine onnxruntime", reason, "pip install onnxruntime")
    with tempfile.TemporaryDirectory() as temporary:
        events = _events(path, arrays, runs, threads, Path(temporary))
        graph = onnx_.load(str(Path(temporary) / "optimized.onnx"), load_external_data=False).graph
    nodes, weights = {node.name: node for node in graph.node}, weights_read(graph)
    seconds: dict[str, float] = {}
    outputs: dict[str, str] = {}
    for event in events:
        name = event["name"].removesuffix(END)
        seconds[name] = seconds.get(name, 0.0) + event["dur"] / 1e6 / runs
        outputs[name] = next(iter(next(iter(event["args"].get("output_type_shape") or [{}]), {})), "unknown")
    return [_kernel(nodes[name], taken, outputs[name], weights) for name, taken in seconds.items() if name in nodes]


def _events(path: Path, arrays: Arrays, runs: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """What the profiler wrote of the kernels after the first run, which still allocates."""
    import onnxruntime

    options = session_options(threads)
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    onnxruntime.disable_telemetry_events()
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        wanted = {value.name: arrays[value.name] for value in session.get_inputs()}
        for _ in range(runs + 1):
            session.run(None, wanted)
        events: list[dict[str, Any]] = json.loads(Path(session.end_profiling()).read_bytes())
    except Exception as error:  # onnxruntime's exceptions share no class of their own
        raise EngineError(
            f"an ONNX file that onnxruntime {onnxruntime.__version__} runs at {path}", f"'{error}'"
        ) from None
    first = min(event["ts"] + event["dur"] for event in events if event["name"] == "model_run")
    return [e for e in events if e.get("cat") == "Node" and e["name"].endswith(END) and e["ts"] >= first]


def _kernel(node: onnx.NodeProto, seconds: float, output: str, weights: dict[str, tuple[str, ...]]) -> Kernel:
    if node.op_type in INTEGER:
        precision = INT8
    elif node.op_type == "MatMulNBits":
        level = next((attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"), 0)
        precision = INT8 if level == 4 else FP32
    else:
        precision = TYPES.get(output, output)
    parameters = weights.get(node.name, ()) if node.op_type in PRODUCTS else ()
    return Kernel(node.name, node.op_type, node.op_type, precision, parameters, seconds)
