"""The kernels that OpenVINO ran, from its runtime graph; the ONNX file tells which weight a merged node multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flyweight.engines.engine import Arrays
from flyweight.engines.kernels import FP32, INT8, Kernel, weights_read
from flyweight.engines.openvino import compiled
from flyweight.engines.openvino_graph import PART
from flyweight.errors import EngineError
from flyweight.extras import need

if TYPE_CHECKING:
    import onnx

__all__ = ["owners", "profile"]

PRODUCTS = {"FullyConnected", "MatMul"}
MULTIPLIES = {"MatMul", "MatMulInteger", "Gemm", "MatMulNBits", "QLinearMatMul"}
# What OpenVINO may draw into the product before it, so that the product bears this one's name.
FOLLOWS = {
    "Add", "Sub", "Mul", "Div", "Cast", "Relu", "Tanh", "Erf", "Gelu", "Sigmoid", "Identity",
    "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
TYPES = {"f32": FP32, "i8": INT8, "u8": INT8}


def profile(path: Path, arrays: Arrays, runs: int, threads: int) -> list[Kernel]:
    """Raises EngineError, MissingExtra (reading the file's names needs onnx)."""
    graph = need("onnx", "read the names in an ONNX file").load(str(path), load_external_data=False).graph
    known = owners(graph)
    model = compiled(path, threads, profile=True)
    request = model.create_infer_request()
    wanted = {value.get_any_name(): arrays[value.get_any_name()] for value in model.inputs}
    seconds: dict[str, float] = {}
    try:
        for turn in range(runs + 1):
            request.infer(wanted)
            for row in request.profiling_info if turn else ():
                seconds[row.node_name] = seconds.get(row.node_name, 0.0) + row.real_time.total_seconds() / runs
    except RuntimeError as error:
        raise EngineError("arrays that the model can take", f"'{error}'", "check ids and lengths") from None
    kernels = [_kernel(node, seconds, known) for node in model.get_runtime_model().get_ordered_ops()]
    return [kernel for kernel in kernels if kernel.seconds > 0 or kernel.parameters]


def owners(graph: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    """Names of nodes and tensors -> the parameters of the product whose result they carry on, element by element."""
    reads = weights_read(graph)
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.node:
        name = node.name or node.output[0]
        mine: tuple[str, ...] = ()
        if node.op_type in MULTIPLIES:
            mine = reads.get(name, ())
        elif node.op_type in FOLLOWS:
            carried = {found[key] for key in node.input if found.get(key)}
            mine = next(iter(carried)) if len(carried) == 1 else ()
        if mine:
            found |= dict.fromkeys((name, *node.output), mine)
    return found


def _kernel(node: Any, seconds: dict[str, float], known: dict[str, tuple[str, ...]]) -> Kernel:
    facts = node.get_rt_info()

    def fact(key: str) -> str:
        return str(facts[key].astype(str)) if key in facts else ""

    kind, primitive = fact("layerType"), fact("primitiveType")
    name = node.get_friendly_name()
    parameters: tuple[str, ...] = ()
    if kind in PRODUCTS:
        # Several products of one input may be run as one; of a chain drawn into one the first is the product.
        names = [part.removesuffix(PART) for part in fact("originalLayersNames").split(",")]
        merged = [known[part] for part in names if known.get(part)]
        parameters = tuple(dict.fromkeys(parameter for part in merged for parameter in part))
    return Kernel(
        name, kind, f"{kind} {primitive}", _precision(kind, primitive, fact), parameters, seconds.get(name, 0.0)
    )


def _precision(kind: str, primitive: str, fact: Callable[[str], str]) -> str:
    """Of the arithmetic. A product with packed weights says i8 of its weights, but its primitive says what it computes in."""
    if kind in PRODUCTS:
        last = primitive.rpartition("_")[2].lower()
        return TYPES.get(last, last)
    kept = fact("runtimePrecision")
    return TYPES.get(kept, kept)
