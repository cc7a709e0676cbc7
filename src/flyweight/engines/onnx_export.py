"""A bundle in torch -> onnx/model.onnx.

The graph is traced without its parameters (they come out as named inputs); then every parameter is put in once, as float or
as packed integers, so that no weight is ever written twice or wider than it is. The tracing exporter is used because it
keeps the parameters' names, makes a graph that onnxruntime's fusions know and needs no further package.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn

from flyweight.artifact import Engine
from flyweight.engines import onnx_nbits
from flyweight.engines.onnx_integer import OPSET
from flyweight.engines.onnx_rewrite import put_weights
from flyweight.errors import ExportError
from flyweight.models.surgery import LINEARS, linears, weight_2d
from flyweight.tasks import Task, task_named

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle, Codes

__all__ = ["FILE", "export"]

FILE = "onnx/model.onnx"
IR = 8  # onnxruntime 1.13 and later read it
EXTERNAL = 2**31 - 2**24  # a protobuf ends at 2 GiB; larger weights go to a file beside it
PREFIX = "model."  # of parameter names, by the attribute of Answer


def export(bundle: Bundle, folder: Path) -> Engine:
    """Write `folder`/onnx/model.onnx. The returned entry has parity 0; `flyweight.parity.check` finds the real one.

    Inputs are int64 [batch, length]. Raises ExportError when the graph cannot be made.
    """
    answer = Answer(bundle, task_named(bundle.task))
    weights, codes = _weights(answer, bundle)
    graph = put_weights(_trace(answer, bundle), weights, codes, bundle.activations, _exact(bundle, codes))
    opsets = [helper.make_opsetid("", OPSET)]
    if any(node.domain == onnx_nbits.DOMAIN for node in graph.node):
        opsets.append(helper.make_opsetid(onnx_nbits.DOMAIN, 1))
    model = helper.make_model(graph, opset_imports=opsets, producer_name="flyweight")
    model.ir_version = IR
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(model, path)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError("a valid ONNX graph", f"'{error}'", "report this model") from error
    return Engine(
        file=FILE,
        inputs=bundle.family.inputs,
        outputs=tuple(output.name for output in model.graph.output),
        precision=precision(bundle, graph),
        parity=0.0,
    )


def precision(bundle: Bundle, graph: onnx.GraphProto) -> str:
    if not bundle.quantized:
        return "fp32"
    if bundle.activations != "none":
        return f"int8-{bundle.activations}"
    return "weights-only-int8-compute" if onnx_nbits.rounds_inputs(graph) else "weights-only"


class Answer(nn.Module):
    """The task's answer as a function of arrays.

    The attention mask goes in as a bias [batch, 1, 1, length], which models take as it is; their own, made from the 2-D
    mask, takes a hundred nodes and is as large as the scores. For decoders, which look back alone, it is [batch, 1, length,
    length]; a decoder beside an encoder makes its own.
    """

    def __init__(self, bundle: Bundle, task: Task) -> None:
        super().__init__()
        self.model = bundle.model
        self.names = bundle.family.inputs
        self.causal = all(stack.name == "decoder" for stack in bundle.family.stacks)
        self.task = task

    def forward(self, *arrays: Tensor) -> Tensor:
        batch = dict(zip(self.names, arrays, strict=True))
        hidden = batch["attention_mask"] == 0
        lowest, length = torch.finfo(torch.float32).min, hidden.shape[1]
        bias = torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, lowest)[:, None, None, :]
        if self.causal:
            bias = torch.minimum(bias, torch.full((length, length), lowest).triu(1))
        output = self.model(**{**batch, "attention_mask": bias})
        return self.task.answer(output, batch)


@contextmanager
def _traceable(model: Any) -> Iterator[None]:
    """On the CPU, in eval mode, with attention spelled out in the operators that engines know how to fuse."""
    attention, training = model.config._attn_implementation, model.training
    device = next(model.parameters()).device
    hooks = [
        module.register_forward_hook(_bias_alone)
        for module in model.modules()
        if isinstance(module, LINEARS) and weight_2d(module).shape[1] == 0
    ]
    model.set_attn_implementation("eager")
    model.eval().to("cpu")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tracer warnings; parity is checked on other lengths than the traced one
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.to(device).train(training)
        model.set_attn_implementation(attention)


def _bias_alone(linear: nn.Module, given: Any, output: Tensor) -> Tensor:
    """[out], for every token the same: of a part that has no units left nothing that leads to its last linear is traced."""
    bias = linear.bias
    return bias if isinstance(bias, Tensor) else torch.zeros(len(weight_2d(linear)))


def _trace(answer: Answer, bundle: Bundle) -> onnx.GraphProto:
    """The graph with parameters as inputs named `PREFIX + name`."""
    output = answer.task.output
    with _traceable(bundle.model), tempfile.TemporaryDirectory() as temporary:
        short, long = _example(bundle, 2, 7), _example(bundle, 3, 11)
        pairs = zip(answer(*short).shape, answer(*long).shape, strict=True)
        moving = {axis: "length" if axis else "batch" for axis, (one, other) in enumerate(pairs) if one != other}
        path = Path(temporary) / "traced.onnx"
        try:
            torch.onnx.export(
                answer,
                short,
                str(path),
                dynamo=False,
                export_params=False,
                do_constant_folding=False,
                input_names=list(answer.names),
                output_names=[output],
                dynamic_axes={name: {0: "batch", 1: "length"} for name in answer.names} | {output: moving},
                opset_version=OPSET,
            )
        except Exception as error:  # the exporter raises many unrelated classes
            raise ExportError(
                f"a {bundle.family.model_type} model that torch.onnx can trace", f"'{error}'", "report this model"
            ) from error
        return onnx.load(str(path)).graph


def _example(bundle: Bundle, batch: int, length: int) -> tuple[Tensor, ...]:
    """Ids that every vocabulary has, the last row padded."""
    made = {name: torch.zeros(batch, length, dtype=torch.int64) for name in bundle.family.inputs}
    made["input_ids"] += (torch.arange(length) + bundle.encoder.pad + 1) % bundle.model.config.vocab_size
    made["attention_mask"] += 1
    made["input_ids"][-1, length - 2 :] = bundle.encoder.pad
    made["attention_mask"][-1, length - 2 :] = 0
    return tuple(made.values())


def _weights(answer: Answer, bundle: Bundle) -> tuple[dict[str, NDArray[Any]], dict[str, Codes]]:
    """Parameters and buffers by their names in the graph, and which of them are quantized (by any of a tied weight's names)."""
    tensors: dict[str, Tensor] = {}
    for source in (answer.named_parameters, answer.named_buffers):
        tensors |= dict(source(remove_duplicate=False))
    by_identity = {id(tensors[PREFIX + name]): codes for name, codes in bundle.quantized.items()}
    codes = {name: by_identity[id(tensor)] for name, tensor in tensors.items() if id(tensor) in by_identity}
    arrays = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu()
        arrays[name] = (value.float() if value.is_floating_point() else value).numpy()
    return arrays, codes


def _exact(bundle: Bundle, codes: Mapping[str, Codes]) -> set[str]:
    """Linears outside the blocks (heads) whose inputs are not to be rounded, since none within is: by names in the graph."""
    rounding = {name for name, one in codes.items() if onnx_nbits.rounds_input(one)}
    inside = {f"{PREFIX}{name}.weight" for name in linears(bundle.model, bundle.family)}
    return set() if rounding & inside else rounding


def _write(model: onnx.ModelProto, path: Path) -> None:
    """One file, or the weights beside it where protobuf's 2 GiB do not suffice. Replaces what was there."""
    data = path.with_name(path.name + ".data")
    data.unlink(missing_ok=True)
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size <= EXTERNAL:
        onnx.save_model(model, str(path))
    else:
        onnx.save_model(model, str(path), save_as_external_data=True, all_tensors_to_one_file=True, location=data.name)
    onnx.checker.check_model(str(path), full_check=True)
