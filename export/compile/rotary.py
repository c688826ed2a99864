"""FLUX's norm and rotation of queries and keys, in a form that a builder makes few kernels of.

In the exported graph a norm is followed by a rotation of its pairs (x0, x1): TensorRT-RTX writes
float32 rows to memory between them. The rotation is linear in each pair and the root mean square is
one number a row, so it may be divided by last:

    y = (x0 · [cos, sin] · w0 + x1 · [-sin, cos] · w1) / sqrt(mean(x²) + epsilon)

What is rotated is read from the projection as it is, and nothing is joined: each pair's two results
are a broadcast of its two values. Tokens of text and image are rotated apart, each with its rows of
the table, and joined afterwards. Equal to the form before up to the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

_FLOAT = ir.DataType.FLOAT
_TOKENS, _PAIRED = 1, 4  # axes of [B, S, heads, width] and [B, S, heads, width / 2, 2]
_SAME = ("Cast", "Unsqueeze", "Reshape")  # what stands between a table and its use


def rewrite(model: ir.Model) -> None:
    """Rewrite every such norm and rotation of a float32 graph, in place."""
    writer = _Writer(model.graph)
    for found in list(_rotations(model.graph)):
        writer.replace(found)
    if writer.tables:
        RemoveUnusedNodesPass()(model)


@dataclass(frozen=True)
class _Rotation:
    """One rotation: its last node, the norms whose rows it joins and rotates, and both tables
    [S, width]."""

    node: ir.Node
    norms: tuple[ir.Node, ...]
    cos: ir.Value
    sin: ir.Value


def _rotations(graph: ir.Graph) -> Iterator[_Rotation]:
    """Every `x · cos + turned(x) · sin` behind norms, with constant tables."""
    for node in graph:
        products = [_producer(value) for value in node.inputs] if node.op_type == "Add" else []
        if [product and product.op_type for product in products] != ["Mul", "Mul"]:
            continue
        straight, turned = products
        assert straight is not None
        assert turned is not None
        x, cos = straight.inputs
        if _turned(turned.inputs[0]) is not x or x is None:
            continue
        tables = _table(cos), _table(turned.inputs[1])
        maker = _producer(x)
        joined = maker is not None and maker.op_type == "Concat"
        norms = [_producer(v) for v in maker.inputs] if maker is not None and joined else [maker]
        if None in tables or any(n is None or n.op_type != "RMSNormalization" for n in norms):
            continue
        if joined and maker is not None and maker.attributes.get_int("axis") != _TOKENS:
            continue
        assert tables[0] is not None
        assert tables[1] is not None
        yield _Rotation(node, tuple(n for n in norms if n is not None), tables[0], tables[1])


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _turned(value: ir.Value | None) -> ir.Value | None:
    """Of the pairs (-x1, x0), the x that they are made of."""
    shaped = _producer(value)
    joined = _producer(shaped.inputs[0]) if shaped and shaped.op_type == "Reshape" else None
    if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
        return None
    first, second = (_producer(value) for value in joined.inputs)
    negated = _producer(first.inputs[0]) if first and first.op_type == "Unsqueeze" else None
    if negated is None or negated.op_type != "Neg" or second is None:
        return None
    one, zero = _element(negated.inputs[0]), _element(second.inputs[0])
    if one is None or zero is None or one[0] is not zero[0] or (one[1], zero[1]) != (1, 0):
        return None
    pairs = _producer(one[0])
    return pairs.inputs[0] if pairs is not None and pairs.op_type == "Reshape" else None


def _element(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Pairs, and which of their two values this is."""
    squeezed = _producer(value)
    cut = _producer(squeezed.inputs[0]) if squeezed and squeezed.op_type == "Squeeze" else None
    if cut is None or cut.op_type != "Slice" or cut.inputs[0] is None or cut.inputs[1] is None:
        return None
    start = cut.inputs[1].const_value
    return None if start is None else (cut.inputs[0], int(start.numpy()[0]))


def _table(value: ir.Value | None) -> ir.Value | None:
    """Return the constant behind what changes its shape or type alone."""
    while (maker := _producer(value)) is not None:
        if maker.op_type not in _SAME:
            return None
        value = maker.inputs[0]
    return value if value is not None and value.const_value is not None else None


class _Writer:
    """Writes the nodes; tables are made once for the rows of all blocks."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.tables: dict[tuple[ir.Value, ir.Value, int, int], tuple[ir.Value, ir.Value]] = {}

    def replace(self, found: _Rotation) -> None:
        name, parts, start = str(found.node.outputs[0].name), [], 0
        for i, norm in enumerate(found.norms):
            tokens = _dims(norm.inputs[0])[_TOKENS]
            tables = self._tables(found, start, start + tokens)
            parts.append(self._rotated(found.node, norm, tables, f"{name}.rotated{i}"))
            start += tokens
        whole = parts[0]
        if len(parts) > 1:
            old = found.node.outputs[0]
            whole = self._add(
                found.node, "Concat", parts, f"{name}.joined", old.shape, axis=_TOKENS
            )
        found.node.outputs[0].replace_all_uses_with(whole)

    def _tables(self, found: _Rotation, start: int, stop: int) -> tuple[ir.Value, ir.Value]:
        """Return what both values of a pair are multiplied by, each [1, S, 1, width / 2, 2]."""
        key = (found.cos, found.sin, start, stop)
        if key not in self.tables:
            cos, sin = (_numbers(t)[start:stop] for t in (found.cos, found.sin))
            first = np.stack([cos[:, 0::2], sin[:, 1::2]], axis=-1)
            second = np.stack([-sin[:, 0::2], cos[:, 1::2]], axis=-1)
            name = f"{found.cos.name}.{start}-{stop}"
            self.tables[key] = (
                self._constant(f"{name}.first", first[None, :, None]),
                self._constant(f"{name}.second", second[None, :, None]),
            )
        return self.tables[key]

    def _rotated(
        self, before: ir.Node, norm: ir.Node, tables: tuple[ir.Value, ir.Value], name: str
    ) -> ir.Value:
        x, weight = norm.inputs
        assert x is not None
        assert x.shape is not None
        images = x.shape[0]
        tokens, heads, width = _dims(x)[1:]
        pairs = ir.Shape([images, tokens, heads, width // 2, 2])
        single, row = ir.Shape([*pairs[:-1], 1]), ir.Shape([images, tokens, heads, 1])

        def add(
            op: str, inputs: list[ir.Value], what: str, shape: ir.Shape, **more: Any
        ) -> ir.Value:
            return self._add(before, op, inputs, f"{name}.{what}", shape, **more)

        shape = self._constant(f"{name}.pairs.shape", np.array([-1, *pairs[1:]]))
        paired = add("Reshape", [x, shape], "pairs", pairs)
        scaled = []
        for i, table in enumerate(tables):
            limits = [
                self._constant(f"{name}.{what}{i}", np.array([number]))
                for what, number in (("from", i), ("to", i + 1), ("axis", _PAIRED))
            ]
            one = add("Slice", [paired, *limits], f"value{i}", single)
            turned = add("Mul", [one, table], f"turned{i}", pairs)
            weights = _numbers(_required(weight))[0][i::2, None]
            factor = self._constant(f"{name}.weight{i}", weights)
            scaled.append(add("Mul", [turned, factor], f"scaled{i}", pairs))
        both = add("Add", scaled, "sum", pairs)
        flat = self._constant(f"{name}.flat.shape", np.array([-1, tokens, heads, width]))
        flattened = add("Reshape", [both, flat], "flat", ir.Shape([*row[:-1], width]))
        axis = self._constant(f"{name}.width", np.array([3]))
        squares = add("ReduceSumSquare", [x, axis], "squares", row, keepdims=1)
        count = self._constant(f"{name}.count", np.array(width, np.float32))
        mean = add("Div", [squares, count], "mean", row)
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        little = self._constant(f"{name}.epsilon", np.array(epsilon, np.float32))
        root = add("Sqrt", [add("Add", [mean, little], "above_zero", row)], "root", row)
        return add("Div", [flattened, root], "normed", ir.Shape([*row[:-1], width]))

    def _add(
        self,
        before: ir.Node,
        op: str,
        inputs: list[ir.Value],
        name: str,
        shape: ir.Shape | None,
        **attributes: Any,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"node_{name}")
        out = node.outputs[0]
        out.name, out.shape, out.type = name, shape, ir.TensorType(_FLOAT)
        self.graph.insert_before(before, node)
        return out

    def _constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value


def _required(weight: ir.Value | None) -> ir.Value:
    found = _table(weight)
    assert found is not None
    return found


def _numbers(value: ir.Value) -> NDArray[np.float32]:
    """Return a table as float32 rows."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    return array.reshape(-1, array.shape[-1]).astype(np.float32)


def _dims(value: ir.Value | None) -> list[int]:
    """Of [B, S, heads, width], the numbers; B, which may be a symbol, counts as 0."""
    assert value is not None
    assert value.shape is not None
    return [dim if isinstance(dim, int) else 0 for dim in value.shape]
