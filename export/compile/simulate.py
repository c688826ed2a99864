"""A 16-bit graph, computed in float32 and rounded where it is 16 bit.

onnxruntime's CPU provider has no bfloat16 kernels for these graphs, and a GPU is not always at
hand. Tensor cores multiply 16-bit numbers and add in float32, so a float32 product of rounded
numbers whose result is rounded is what they compute, but for the order of the sums. Kernels that
fuse several operators round less often.
"""

from __future__ import annotations

import onnx_ir as ir

from export.compile.mixed_precision import FLOAT, TYPES

_HALVES = tuple(TYPES.values())


def simulate(model: ir.Model) -> None:
    """Rewrite a graph of `half.convert` in place, for a consumer that computes float32 alone."""
    graph = model.graph
    for value in [v for v in graph.initializers.values() if v.dtype in _HALVES]:
        users = list(value.uses())
        wide = _cast(value, FLOAT)
        for node, index in users:
            node.replace_input_with(index, wide.outputs[0])
        graph.insert_before(graph[0], wide)
    for node in list(graph):
        for value in node.outputs:
            if value.dtype in _HALVES:
                _round(graph, node, value)


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    half = value.dtype
    assert half is not None
    users = list(value.uses())
    if node.op_type != "Cast":
        value.dtype = FLOAT
        if "output_dtype" in node.attributes:
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", FLOAT.value)
        narrow = _cast(value, half)
        graph.insert_after(node, narrow)
        node, value = narrow, narrow.outputs[0]
    wide = _cast(value, FLOAT)
    graph.insert_after(node, wide)
    for user, index in users:
        user.replace_input_with(index, wide.outputs[0])


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype.value})
    node.outputs[0].name = f"{value.name}.as_{dtype.name.lower()}"
    node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(dtype)
    return node
