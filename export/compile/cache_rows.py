"""Writing rows into a cache whose capacity is a size of the run.

TensorRT makes its own layer of TensorScatter, for caches of one fixed capacity alone. Here, rows
are scattered element by element: the same values, for a copy of the cache in every step, which is
a hundredth of the weights that the step reads.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

INT64 = ir.TensorType(ir.DataType.INT64)
ROWS = 2  # the axis of a cache along which rows are written


def rewrite(model: ir.Model) -> None:
    """Replace every TensorScatter in place, by ScatterElements."""
    graph = model.graph
    places: dict[tuple[ir.Value | None, str], ir.Value] = {}
    for node in [node for node in graph if node.op_type == "TensorScatter"]:
        cache, rows, at = node.inputs
        assert rows is not None
        key = (at, str(rows.shape))
        if key not in places:
            places[key] = _places(graph, node, rows, at)
        scattered = ir.node(
            "ScatterElements", [cache, places[key], rows], {"axis": ROWS}, name=f"{node.name}.rows"
        )
        out, old = scattered.outputs[0], node.outputs[0]
        out.shape, out.type = old.shape, old.type
        name, old.name = old.name, f"{old.name}.replaced"
        out.name = name
        graph.insert_before(node, scattered)
        old.replace_all_uses_with(out, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _places(graph: ir.Graph, before: ir.Node, rows: ir.Value, at: ir.Value | None) -> ir.Value:
    """For every element of `rows` [U, H, R, W], the row of the cache that it goes to."""
    prefix = f"{before.name}.places"

    def number(name: str, values: int | list[int]) -> ir.Value:
        array = np.array(values, np.int64)
        value = ir.Value(
            name=f"{prefix}.{name}",
            shape=ir.Shape(array.shape),
            type=INT64,
            const_value=ir.tensor(array),
        )
        graph.register_initializer(value)
        return value

    def add(name: str, operator: str, inputs: list[ir.Value | None], shape: ir.Shape) -> ir.Value:
        node = ir.node(operator, inputs, name=f"{prefix}.{name}")
        node.outputs[0].name = f"{prefix}.{name}.out"
        node.outputs[0].shape, node.outputs[0].type = shape, INT64
        graph.insert_before(before, node)
        return node.outputs[0]

    assert rows.shape is not None
    texts, _, count, _ = rows.shape
    zero, one = number("zero", 0), number("one", 1)
    shape = add("shape", "Shape", [rows], ir.Shape([4]))
    many = add("count", "Gather", [shape, number("axis", ROWS)], ir.Shape([]))
    new = add("new", "Range", [zero, many, one], ir.Shape([count]))
    first = add("first", "Unsqueeze", [at, number("behind", [1])], ir.Shape([texts, 1]))
    place = add("place", "Add", [first, new], ir.Shape([texts, count]))
    around = number("around", [1, 3])
    wide = add("wide", "Unsqueeze", [place, around], ir.Shape([texts, 1, count, 1]))
    return add("whole", "Expand", [wide, shape], rows.shape)
