"""Floating-point operations of a graph, counted from its nodes.

Matrix products, attention and convolutions; a multiply-add counts two. Everything else is less than
a thousandth of these networks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Mapping

import onnx_ir as ir
import sympy

CONVOLUTIONS = ("Conv", "ConvTranspose")
OPERATORS = ("MatMul", "Gemm", "Attention", *CONVOLUTIONS)


def count(model: ir.Model, sizes: Mapping[str, int], operators: Collection[str] = OPERATORS) -> int:
    """FLOPs of one run.

    Args:
        sizes: a number for every symbol of the graph's inputs.
        operators: those that count.

    Raises:
        ValueError: a shape that the graph does not state.
    """
    nodes = (node for node in model.graph.all_nodes() if node.op_type in operators)
    return sum(_node(node, sizes) for node in nodes)


def _node(node: ir.Node, sizes: Mapping[str, int]) -> int:
    if node.op_type == "MatMul":
        left, right = shape_of(node.inputs[0], sizes), shape_of(node.inputs[1], sizes)
        many = max(math.prod(left[:-2]), math.prod(right[:-2]))
        return 2 * many * left[-2] * left[-1] * right[-1]
    if node.op_type == "Gemm":
        weight = shape_of(node.inputs[1], sizes)
        rows = shape_of(node.inputs[0], sizes)[node.attributes.get_int("transA", 0)]
        return 2 * rows * weight[0] * weight[1]
    if node.op_type == "Attention":
        batch, heads, queries, width = shape_of(node.inputs[0], sizes)
        keys = shape_of(node.inputs[1], sizes)[2]
        value_width = shape_of(node.inputs[2], sizes)[3]
        return 2 * batch * heads * queries * keys * (width + value_width)
    if node.op_type == "Conv":
        kernel = shape_of(node.inputs[1], sizes)  # [out, in / groups, h, w]
        return 2 * math.prod(shape_of(node.outputs[0], sizes)) * math.prod(kernel[1:])
    if node.op_type == "ConvTranspose":
        kernel = shape_of(node.inputs[1], sizes)  # [in, out / groups, h, w]
        return 2 * math.prod(shape_of(node.inputs[0], sizes)) * math.prod(kernel[1:])
    return 0


def shape_of(value: ir.Value | None, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a value's sizes.

    Raises:
        ValueError: the graph does not state them.
    """
    if value is None or value.shape is None:
        raise ValueError(f"the graph does not state the shape of {value and value.name}")
    return tuple(_size(dim, sizes) for dim in value.shape)


def _size(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    if not isinstance(dim, ir.SymbolicDim):
        return int(dim)
    return _evaluate(str(dim.value), tuple(sorted(sizes.items())))


@functools.cache
def _evaluate(expression: str, sizes: tuple[tuple[str, int], ...]) -> int:
    """Return a size such as `branches*images`, or `text_tokens + 256`."""
    symbols = {name: sympy.Symbol(name) for name, _ in sizes}
    return int(sympy.sympify(expression, locals=symbols).subs(dict(sizes)))
