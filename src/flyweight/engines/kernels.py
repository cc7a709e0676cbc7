"""What an engine really ran: one row a kernel of its own profile, put down to the weight that it multiplied by.

An engine rewrites the graph that it is given: it merges operators, takes an integer kernel or falls back to float, and says
nothing. Its profile tells, and the names of the weights (`model.` + the parameter's name + the part, as `onnx_export` writes
them) tell which layer a kernel belongs to.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flyweight.artifact import KernelReport, KernelRun, KernelTotal, QuantizedTensor
from flyweight.engines.engine import Arrays
from flyweight.errors import EngineError

if TYPE_CHECKING:
    import onnx

__all__ = ["PROFILERS", "Kernel", "parameter_named", "profile", "report", "weights_read"]

# engine -> module with `profile(path, arrays, runs, threads) -> list[Kernel]`; torch has none: it runs float operators one by one
PROFILERS = {
    "onnxruntime": "flyweight.engines.onnxruntime_kernels",
    "openvino": "flyweight.engines.openvino_kernels",
}
INTEGER_ACTIVATIONS = {"onnxruntime": "dynamic or static", "openvino": "static"}
PARAMETER = re.compile(r"model\.((?:.+?\.)?weight)(?:\.|$)")
INT8, FP32 = "int8", "fp32"


class Kernel(NamedTuple):
    """One node of the graph that ran.

    kernel:     what the engine took for the operator, as it calls it
    precision:  of the arithmetic: "int8", "fp32", or another type's name
    parameters: the weights that it multiplies by
    seconds:    of one run
    """

    node: str
    operator: str
    kernel: str
    precision: str
    parameters: tuple[str, ...]
    seconds: float


def profile(engine: str, path: Path, arrays: Arrays, runs: int = 10, threads: int = 1) -> list[Kernel]:
    """Run the file at `path` `runs` times (after warming up) under the engine's profiler; seconds are the mean of a run.

    Raises EngineError (no such profiler, or the engine cannot run the file), MissingExtra.
    """
    if engine not in PROFILERS:
        raise EngineError(f"an engine with a profile of its kernels ({', '.join(PROFILERS)})", f"'{engine}'")
    found: list[Kernel] = importlib.import_module(PROFILERS[engine]).profile(Path(path), arrays, runs, threads)
    return found


def parameter_named(initializer: str) -> str | None:
    """`model.bert.pooler.dense.weight.codes` -> `bert.pooler.dense.weight`; None for what belongs to no weight."""
    found = PARAMETER.match(initializer)
    return found[1] if found else None


def weights_read(graph: onnx.GraphProto) -> dict[str, tuple[str, ...]]:
    """Node -> the parameters it reads, directly or through nodes that only rearrange constants (name or first output as key)."""
    constant: dict[str, tuple[str, ...]] = {}
    for tensor in graph.initializer:
        name = parameter_named(tensor.name)
        constant[tensor.name] = () if name is None else (name,)
    read: dict[str, tuple[str, ...]] = {}
    for node in graph.node:
        given = [name for name in node.input if name]
        found = tuple(dict.fromkeys(name for key in given for name in constant.get(key, ())))
        if all(name in constant for name in given):
            constant |= dict.fromkeys(node.output, found)
        elif found:
            read[node.name or node.output[0]] = found
    return read


def report(
    kernels: Sequence[Kernel], linears: Collection[str], quantized: Mapping[str, QuantizedTensor], engine: str
) -> KernelReport:
    """linears: names of the weights of the blocks' linears; quantized: how weights are stored (a manifest's)."""
    whole = sum(kernel.seconds for kernel in kernels) or 1.0
    by_weight: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        for name in kernel.parameters:
            by_weight.setdefault(name, []).append(kernel)
    runs = {name: _run(ran, whole) for name, ran in sorted(by_weight.items())}
    text = tuple(_text(runs, linears, quantized, engine))
    return KernelReport(linears=runs, totals=_totals(kernels, whole), text=text)


def _run(kernels: Sequence[Kernel], whole: float) -> KernelRun:
    """One linear; the integer product first where some of its channels are multiplied in float beside it."""
    ordered = sorted(kernels, key=lambda kernel: kernel.precision != INT8)
    return KernelRun(
        kernel=" + ".join(dict.fromkeys(kernel.kernel for kernel in ordered)),
        precision=" + ".join(dict.fromkeys(kernel.precision for kernel in ordered)),
        share=sum(kernel.seconds / len(kernel.parameters) for kernel in kernels) / whole,
    )


def _totals(kernels: Iterable[Kernel], whole: float) -> tuple[KernelTotal, ...]:
    count: Counter[tuple[str, str]] = Counter()
    seconds: Counter[tuple[str, str]] = Counter()
    for kernel in kernels:
        key = (kernel.kernel, kernel.precision)
        count[key] += 1
        seconds[key] += kernel.seconds  # type: ignore[assignment]  # Counter is typed for whole numbers
    return tuple(
        KernelTotal(kernel=name, precision=precision, nodes=count[name, precision], share=taken / whole)
        for (name, precision), taken in seconds.most_common()
    )


def _text(
    runs: Mapping[str, KernelRun], linears: Collection[str], quantized: Mapping[str, QuantizedTensor], engine: str
) -> Iterable[str]:
    """Sentences: how many linears ran in integers; what the bits that do not make it faster are good for."""
    inside = {name: runs[name] for name in linears if name in runs}
    integer = {name: run for name, run in inside.items() if run.precision.startswith(INT8)}
    share = f"{sum(run.share for run in inside.values()):.0%} of the time"
    if integer:
        yield (
            f"{len(integer)} of {len(linears)} linears of the blocks ran in integer kernels of {engine} "
            f"({_kernels(integer.values())}); all linears of the blocks together took {share}."
        )
    else:
        yield (
            f"{len(inside)} of {len(linears)} linears of the blocks ran in float kernels of {engine} "
            f"({_kernels(inside.values())}); together they took {share}."
        )
    if missing := len(linears) - len(inside):
        yield f"{missing} linears of the blocks were not found in its profile."
    by_bits: dict[tuple[int, bool, bool], int] = {}
    for name, run in inside.items():
        if name in quantized:
            key = (quantized[name].bits, name in integer, "NBits" in run.kernel)
            by_bits[key] = by_bits.get(key, 0) + 1
    for (bits, fast, packed), number in sorted(by_bits.items()):
        if said := _use(bits, fast, packed, engine):
            yield f"{number} linears stored in {_bits(bits)} {said}"


def _use(bits: int, fast: bool, packed: bool, engine: str) -> str | None:
    """What a format is good for, where it is not the fastest one."""
    if not fast:
        return (
            "ran in float: smaller on disk, not faster than int8. "
            f"Integer kernels of {engine} take int8 with activations {INTEGER_ACTIVATIONS[engine]}."
        )
    if packed:
        return (
            f"stay packed and are unpacked in every run: {bits}/8 of int8's bytes on disk and in memory. "
            "That pays for one token at a time; for many tokens at once int8 with int8 activations is faster."
        )
    if bits < 7:
        return f"are made int8 when the file is loaded: {bits}/8 of int8's bytes on disk, its speed and memory."
    return None


def _kernels(runs: Iterable[KernelRun]) -> str:
    return ", ".join(f"{number} {name}" for name, number in Counter(run.kernel for run in runs).most_common()) or "none"


def _bits(bits: int) -> str:
    return "1 bit" if bits == 1 else f"{bits} bits"
