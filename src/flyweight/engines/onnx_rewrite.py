"""Puts the parameters into a traced graph: each once, in its final form, and no node left that only rearranges one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, helper, numpy_helper

from flyweight.engines.onnx_integer import OPSET, Draft, quantized_embedding, quantized_linear
from flyweight.engines.onnx_nbits import weights_only_linear
from flyweight.engines.onnx_qdq import rounded_linear, smoothed, with_outliers
from flyweight.engines.onnx_rows import reshaped, sizes, token_by_token, whole
from flyweight.errors import ExportError
from flyweight.models.bundle import Codes

__all__ = ["put_weights"]


class Linear(NamedTuple):
    """`x @ weight + bias`, as some node of the traced graph says it."""

    x: str
    weight: str
    bias: str | None
    output: str


def put_weights(
    graph: onnx.GraphProto,
    weights: Mapping[str, NDArray[Any]],
    quantized: Mapping[str, Codes],
    activations: str,
    exact: Collection[str] = (),
) -> onnx.GraphProto:
    """`graph` has its parameters as inputs; the result has them as initializers, those in `quantized` as integers.

    activations: what becomes of the inputs of quantized linears (`Bundle.activations`)
    exact: weights whose inputs stay in float where MatMulNBits would round them

    A weight that is both a table and a linear is stored once. Raises ExportError for a quantized weight that is read by
    anything but lookups and linears.
    """
    return _Rewriter(graph, weights, quantized, activations, exact).run()


class _Rewriter:
    """One pass over the nodes in execution order.

    same:   name in the traced graph -> name in the draft (constants of equal value are one)
    turned: output of a Transpose of a weight -> the weight; the Transpose itself is not kept
    done:   sums with a bias that stand in the draft already, together with the product
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        weights: Mapping[str, NDArray[Any]],
        quantized: Mapping[str, Codes],
        activations: str,
        exact: Collection[str],
    ) -> None:
        self.graph, self.weights, self.quantized, self.activations = graph, weights, quantized, activations
        self.exact = exact
        self.draft = Draft(leads=_leads(graph))
        self.same: dict[str, str] = {}
        self.turned: dict[str, str] = {}
        self.readers: dict[str, set[str]] = {}
        self.done: set[str] = set()
        self.nodes = self._own_names(graph)
        for node in self.nodes:
            if any(attribute.type == AttributeProto.GRAPH for attribute in node.attribute):
                raise ExportError(
                    "a traced graph without branches", f"{node.op_type} in {node.name}", "report this model"
                )
            for name in node.input:
                self.readers.setdefault(name, set()).add(node.op_type)
            if node.op_type == "Gather" and node.input[0] in quantized:
                self.draft.tables.add(node.input[0])

    def run(self) -> onnx.GraphProto:
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self._constant(node)
            elif node.op_type == "Transpose" and node.input[0] in self.weights and _attributes(node)["perm"] == [1, 0]:
                self.turned[node.output[0]] = node.input[0]
            else:
                self._node(node)
        for value in self.graph.output:
            whole(self.draft, value.name)
        inputs = [value for value in self.graph.input if value.name not in self.weights]
        initializers = list(self.draft.initializers.values())
        return helper.make_graph(self.draft.nodes, "flyweight", inputs, list(self.graph.output), initializers)

    def _own_names(self, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
        """Undo the exporter's merging of equal parameters (Identity: one -> the other); only one tensor tied is one still."""
        nodes: list[onnx.NodeProto] = []
        tied: dict[str, str] = {}
        for node in graph.node:
            if node.op_type == "Identity" and node.input[0] in self.weights and node.output[0] in self.weights:
                one, other = node.input[0], node.output[0]
                if self.weights[one].ctypes.data == self.weights[other].ctypes.data:
                    tied[other] = tied.get(one, one)
            else:
                nodes.append(node)
        for node in nodes:
            node.input[:] = [tied.get(name, name) for name in node.input]
        return nodes

    def _constant(self, node: onnx.NodeProto) -> None:
        value = numpy_helper.to_array(node.attribute[0].t)
        if value.size > 1 and value.size * value.itemsize > 256:
            name = f"constant.{node.output[0]}"
        else:
            name = f"constant.{value.dtype}.{'x'.join(map(str, value.shape))}.{value.tobytes().hex()}"
        self.same[node.output[0]] = self.draft.constant(name, value)

    def _node(self, node: onnx.NodeProto) -> None:
        if node.output[0] in self.done and node.op_type == "Add":
            return
        linear = self._linear(node)
        if linear and linear.weight in self.quantized:
            self._quantized_linear(linear)
        elif node.op_type == "Gather" and node.input[0] in self.quantized:
            self._quantized_lookup(node)
        elif node.op_type == "Shape" and not node.attribute and node.input[0] in self.draft.pending:
            self.same[node.output[0]] = sizes(self.draft, node.input[0])
        else:
            self._kept(node)

    def _kept(self, node: onnx.NodeProto) -> None:
        inputs = [self._found(name) for name in node.input]
        if token_by_token(self.draft, node, inputs) or reshaped(self.draft, node, inputs):
            return
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        del kept.input[:]
        kept.input.extend(whole(self.draft, name) for name in inputs)
        self.draft.nodes.append(kept)

    def _linear(self, node: onnx.NodeProto) -> Linear | None:
        """What `node` computes, where it multiplies by a weight from the right."""
        if node.op_type == "MatMul":
            weight = self.turned.get(node.input[1], node.input[1])
            return Linear(self._found(node.input[0]), weight, None, node.output[0]) if weight in self.weights else None
        if node.op_type == "Gemm" and node.input[1] in self.weights:
            given = _attributes(node)
            if given.get("alpha", 1) == given.get("beta", 1) == 1 and not given.get("transA", 0):
                bias = node.input[2] if len(node.input) > 2 else None
                return Linear(self._found(node.input[0]), node.input[1], bias, node.output[0])
        return None

    def _quantized_linear(self, linear: Linear) -> None:
        name, codes = linear.weight, self.quantized[linear.weight]
        product = linear.output if linear.bias is None else f"{linear.output}.product"
        if self.activations == "dynamic":
            x = whole(self.draft, linear.x)
            inner = product if codes.outliers is None else f"{product}.integers"
            quantized_linear(self.draft, smoothed(self.draft, x, codes), name, codes, inner)
            with_outliers(self.draft, x, name, codes, inner, product)
        elif self.activations == "token" or codes.input_scale is not None:
            added = self._added(linear)
            if added is not None:
                bias, output = added
                self.done.add(output)
                rounded_linear(self.draft, linear.x, name, codes, self.activations, output, (bias, self.weights[bias]))
                return
            rounded_linear(self.draft, linear.x, name, codes, self.activations, product)
        else:
            # few beside integer kernels, or beside float ones (heads): as exact as can be
            exact = self.activations == "static" or name in self.exact
            weights_only_linear(self.draft, whole(self.draft, linear.x), name, codes, product, exact)
        if linear.bias is not None:
            self.draft.add("Add", [product, self._name(linear.bias)], linear.output)

    def _added(self, linear: Linear) -> tuple[str, str] | None:
        """(bias, output) where the product goes nowhere but into the sum with a bias, in the same node or the next."""
        if linear.bias is not None:
            return (linear.bias, linear.output) if linear.bias in self.weights else None
        readers = [node for node in self.nodes if linear.output in node.input]
        if len(readers) != 1 or readers[0].op_type != "Add" or linear.output in {out.name for out in self.graph.output}:
            return None
        other = next((name for name in readers[0].input if name != linear.output), "")
        if other not in self.weights or self.weights[other].ndim != 1:
            return None
        return other, readers[0].output[0]

    def _quantized_lookup(self, node: onnx.NodeProto) -> None:
        name, ids = node.input[0], self._name(node.input[1])
        if _attributes(node).get("axis", 0) != 0:
            raise ExportError(f"a lookup of rows of {name}", "one of columns", "leave it out with skip")
        tied = self.readers[name] != {"Gather"}
        quantized_embedding(self.draft, ids, name, self.quantized[name], node.output[0], tied)

    def _name(self, name: str) -> str:
        """The draft's name of what the traced graph calls `name`, in its own shape."""
        return whole(self.draft, self._found(name))

    def _found(self, name: str) -> str:
        """The same, be it there as a matrix alone; puts a float weight in where it is first read."""
        if name in self.turned:
            return self._turned(self.turned[name], name)
        if name not in self.weights:
            return self.same.get(name, name)
        if name in self.quantized:
            raise ExportError(
                f"{name} read by a lookup or a linear", f"{', '.join(self.readers[name])}", "leave it out with skip"
            )
        return self.draft.constant(name, self.weights[name])

    def _turned(self, weight: str, output: str) -> str:
        """A float weight as [in, out]: stored so, or turned at load where somebody reads it the other way too."""
        if weight in self.quantized:
            raise ExportError(f"{weight} read by a linear", "another operation", "leave it out with skip")
        if self.readers[weight] == {"Transpose"}:
            return self.draft.constant(weight, np.ascontiguousarray(self.weights[weight].T))
        if not self.draft.has(output):
            self.draft.add("Transpose", [self._name(weight)], output, perm=[1, 0])
        return output


def _leads(graph: onnx.GraphProto) -> dict[str, str]:
    """{value: a name for its axes but the last} where sizes are known, be it by a symbol; equal names are equal sizes."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    found = {}
    for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info:
        sizes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim[:-1]]
        if sizes and all(sizes):
            found[value.name] = ".".join(map(str, sizes))
    return found


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
