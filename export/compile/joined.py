"""A product whose input is two values side by side -> the sum of two products.

FLUX's single blocks join attention and MLP before one projection. To join them, TensorRT-RTX writes
both to memory once more, and the MLP's GELU cannot be the end of the product before it. Quantized
products stay: nothing is fused with them in either form, and one sum is less to write.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def rewrite(model: ir.Model) -> None:
    """Rewrite every such product of a float32 graph, in place."""
    graph, changed = model.graph, False
    for node in list(graph):
        joined = node.inputs[0].producer() if node.op_type == "MatMul" and node.inputs[0] else None
        if joined is None or not _side_by_side(joined):
            continue
        weight, cast = _weight(node.inputs[1])
        if weight is not None:
            _split(graph, node, joined, weight, cast)
            changed = True
    if changed:
        RemoveUnusedNodesPass()(model)


def _side_by_side(node: ir.Node) -> bool:
    """Say whether two computed values are joined along their last axis, for one product alone."""
    out = node.outputs[0]
    if node.op_type != "Concat" or len(node.inputs) != 2 or len(out.uses()) != 1:
        return False
    shape, axis = out.shape, node.attributes.get_int("axis")
    if shape is None or axis not in (-1, len(shape) - 1):
        return False
    widths = [value.shape[-1] for value in node.inputs if value is not None and value.shape]
    return len(widths) == 2 and all(isinstance(width, int) for width in widths)


def _weight(value: ir.Value | None) -> tuple[ir.Value | None, ir.Node | None]:
    """Return the constant [K, N] of this product alone, and the Cast that it is behind."""
    cast = None if value is None else value.producer()
    if cast is not None:
        value = cast.inputs[0] if cast.op_type == "Cast" else None
    alone = value is not None and value.const_value is not None and len(value.uses()) == 1
    return (value, cast) if alone else (None, None)


def _split(
    graph: ir.Graph, node: ir.Node, joined: ir.Node, weight: ir.Value, cast: ir.Node | None
) -> None:
    out, stored = node.outputs[0], weight.const_value
    assert stored is not None
    start, parts = 0, []
    for i, value in enumerate(joined.inputs):
        assert value is not None
        assert value.shape is not None
        width = value.shape[-1]
        assert isinstance(width, int)
        part = _rows(graph, weight, start, start + width)
        start += width
        if cast is not None:
            unpacked = ir.node("Cast", [part], dict(cast.attributes), name=f"{cast.name}.{i}")
            unpacked.outputs[0].shape = part.shape
            graph.insert_before(node, unpacked)
            part = _named(unpacked, f"{part.name}.cast", cast.outputs[0])
        product = ir.node("MatMul", [value, part], name=f"{node.name}.{i}")
        product.outputs[0].shape = out.shape
        parts.append(_named(product, f"{out.name}.{i}", out))
        graph.insert_before(node, product)
    total = ir.node("Add", parts, name=f"{node.name}.sum")
    graph.insert_before(node, total)
    total.outputs[0].shape = out.shape
    out.replace_all_uses_with(_named(total, f"{out.name}.sum", out))
    graph.remove(node, safe=True)
    if cast is not None:
        graph.remove(cast, safe=True)
    del graph.initializers[str(weight.name)]


def _named(node: ir.Node, name: str, other: ir.Value) -> ir.Value:
    """Return a node's output, with a name and another value's type."""
    value = node.outputs[0]
    assert other.dtype is not None
    value.name, value.type = name, ir.TensorType(other.dtype)
    return value


def _rows(graph: ir.Graph, weight: ir.Value, start: int, stop: int) -> ir.Value:
    """Return some rows of a weight, read when they are asked for."""
    stored = weight.const_value
    assert stored is not None
    name, shape = f"{weight.name}.rows{start}", ir.Shape([stop - start, *stored.shape.numpy()[1:]])
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(stored.dtype))
    read = functools.partial(_read, stored, start, stop, name)
    value.const_value = ir.LazyTensor(read, stored.dtype, shape, name=name)
    graph.register_initializer(value)
    return value


def _read(stored: ir.TensorProtocol, start: int, stop: int, name: str) -> ir.Tensor[Any]:
    return ir.Tensor(np.asarray(stored.numpy()[start:stop]), dtype=stored.dtype, name=name)
