"""A float32 graph -> one that computes in 16 bit where that is safe.

A strongly typed builder computes what the graph says, so the graph must say it. Matrix products,
convolutions and attention take and give 16 bit, and so do embeddings and what only moves such data
or follows it elementwise. Float32 stay, because 16 bit would lose range or add up:

- norms, softmax, powers, sines and everything else that is not named here;
- the sum of two computed values: residual streams, whose values grow from block to block;
- whatever meets a float32 value: modulations, rotary tables, sigmas;
- transposed convolutions, for which TensorRT-RTX has no bfloat16 kernels;
- the layers that the engine's definition names (`float32_layers`);
- the scale of attention, on Q before that is rounded: a parser multiplies Q and K by its root, in
  their own type, and a bfloat16 of it is off by up to 0.2 %, the logits by twice that;
- the doors, so that a set has one interface in every precision. The largest of them, the K/V cache
  and the modulations, are less than a hundredth of the weights that the same step reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from export.errors import CompileError
from export.formats import FULL, HALF, SIXTEEN_BIT
from export.stages import Definition

FLOAT = ir.DataType.FLOAT
TYPES = {declared.dtype: ir.DataType[declared.dtype.upper()] for declared in SIXTEEN_BIT}
# those with a shorter range than float32
_SHORT = {TYPES[declared.dtype] for declared in SIXTEEN_BIT if declared.runtime.largest is not None}

# A gated product (SwiGLU, T5's gated GELU) can reach beyond float16, whose largest number is 65504.
# Its matrix product runs on a 64th of it, which costs only the last bits of values below 0.004.
GATE_SHIFT = 64.0

_PRODUCTS = ("MatMul", "Gemm", "Conv", "Attention")
_MOVES = (
    *("Reshape", "Transpose", "Slice", "Split", "Gather", "Expand", "Squeeze", "Unsqueeze"),
    *("Concat", "Identity", "Flatten", "Resize"),
)
_FOLLOW = ("Add", "Sub", "Mul", "Div", "Neg", "Relu", "Gelu", "Sigmoid", "Tanh")
_BOUNDED = ("Sigmoid", "Tanh")
_REARRANGES = ("Transpose", "Reshape")
_QUANTIZE = ("QuantizeLinear", "DequantizeLinear", "TRT_FP4DynamicQuantize")


def convert(model: ir.Model, engine: Definition, compute: str) -> None:
    """Rewrite an engine's graph in place. Its doors keep their names and types.

    Args:
        compute: a dtype of `TYPES`.

    Raises:
        CompileError: when the constants are read: one is beyond the range of float16.
    """
    _Converter(model.graph, engine, TYPES[compute]).run()
    RemoveUnusedNodesPass()(model)


def constant(value: ir.Value | None) -> ir.Value | None:
    """Return the initializer that a value is, maybe behind a Cast; None where it is computed."""
    if value is None:
        return None
    node = value.producer()
    if node is not None:
        return constant(node.inputs[0]) if node.op_type == "Cast" else None
    return value if value.const_value is not None else None


class _Converter:
    """Which values are 16 bit is written in their dtype, node by node."""

    def __init__(self, graph: ir.Graph, engine: Definition, half: ir.DataType) -> None:
        self.graph, self.stage, self.half = graph, engine.name, half
        self.names = engine.float32_layers
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.wanted: set[ir.Value] = set()  # read by 16-bit products alone
        self.products: set[ir.Node] = set()
        self.exact: set[ir.Node] = set()  # scales, applied in float32

    def run(self) -> None:
        self.products = {
            node
            for node in self.graph
            if node.op_type in _PRODUCTS and _is_float(node.outputs[0]) and not self._kept(node)
        }
        for node in self.products:
            if node.op_type == "Attention":
                self._scale_query(node)
        if self.half in _SHORT:
            self._shift_gates()
        for node in reversed(list(self.graph)):
            self._want(node)
        for node in list(self.graph):
            self._convert(node)
        for index, value in enumerate(self.graph.outputs):
            if value.dtype == self.half:
                self.graph.outputs[index] = self._door(value)

    def _kept(self, node: ir.Node) -> bool:
        """Say whether the definition names this layer, by its weight or by the bias added to it."""
        near = list(node.inputs)
        for user in node.outputs[0].consumers():
            near += user.inputs if user.op_type == "Add" else ()
        stored = (constant(value) for value in near)
        return any(str(c.name).startswith(self.names) for c in stored if c is not None)

    def _scale_query(self, node: ir.Node) -> None:
        """Q · scale before what rearranges Q, and a scale of 1."""
        factor = _attention_scale(node)
        node.attributes["scale"] = ir.AttrFloat32("scale", 1.0)
        if factor == 1.0:
            return
        user, value = node, node.inputs[0]
        while (
            value is not None
            and (maker := value.producer()) is not None
            and maker.op_type in _REARRANGES
            and len(list(value.uses())) == 1
        ):
            user, value = maker, maker.inputs[0]
        assert value is not None
        scaled = self._scale(value, factor, f"{node.outputs[0].name}.query")
        user.replace_input_with(0, scaled.outputs[0])
        self.graph.insert_before(user, scaled)
        self.exact.add(scaled)

    def _shift_gates(self) -> None:
        for node in list(self.products):
            if node.op_type == "MatMul" and _is_gated(node.inputs[0]):
                self._scale_before(node, 1 / GATE_SHIFT)
                self.exact.add(self._scale_after(node, GATE_SHIFT))

    def _scale_before(self, node: ir.Node, factor: float) -> None:
        value = node.inputs[0]
        assert value is not None
        scaled = self._scale(value, factor)
        node.replace_input_with(0, scaled.outputs[0])
        self.graph.insert_before(node, scaled)

    def _scale_after(self, node: ir.Node, factor: float) -> ir.Node:
        value = node.outputs[0]
        scaled = self._scale(value, factor)
        value.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
        scaled.replace_input_with(0, value)  # its own use was replaced too
        self.graph.insert_after(node, scaled)
        return scaled

    def _scale(self, value: ir.Value, factor: float, name: str = "") -> ir.Node:
        name = name or f"{value.name}.times_{factor:g}"
        number = ir.Value(
            name=f"{name}.factor",
            shape=ir.Shape([]),
            type=ir.TensorType(FLOAT),
            const_value=ir.tensor(np.float32(factor)),
        )
        self.graph.register_initializer(number)
        node = ir.node("Mul", [value, number], name=f"node_{name}")
        node.outputs[0].name, node.outputs[0].shape = name, value.shape
        node.outputs[0].type = ir.TensorType(FLOAT)
        return node

    def _want(self, node: ir.Node) -> None:
        """Mark what only products read, through whatever moves it: a value is rounded where it is
        made, and half as much is moved."""
        if node in self.products or (self._passes(node) and self._all_wanted(node)):
            self.wanted |= {value for value in _data(node) if self._for_products(value)}

    def _for_products(self, value: ir.Value) -> bool:
        return not value.is_graph_output() and all(
            user in self.products
            or (self._passes(user) and value in _data(user) and self._all_wanted(user))
            for user in value.consumers()
        )

    def _passes(self, node: ir.Node) -> bool:
        return node.op_type in _MOVES or node.op_type in _QUANTIZE

    def _all_wanted(self, node: ir.Node) -> bool:
        return all(output in self.wanted for output in node.outputs)

    def _convert(self, node: ir.Node) -> None:
        if not self._in_half(node):
            if node.op_type != "Shape":
                self._take(node, list(node.inputs), FLOAT)
            return
        self._take(node, list(_data(node)), self.half)
        for output in node.outputs:
            if _is_float(output):
                output.dtype = self.half
        if node.op_type == "DequantizeLinear" and "output_dtype" in node.attributes:
            node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", self.half.value)

    def _in_half(self, node: ir.Node) -> bool:
        if node in self.products:
            return True
        data = [value for value in _data(node) if value.dtype in (FLOAT, self.half)]
        computed = [value for value in data if constant(value) is None]
        if node.op_type in _QUANTIZE:
            return self._all_wanted(node)
        if node.op_type in _MOVES:
            looked_up = node.op_type == "Gather" and not computed  # embeddings
            rounded = looked_up or all(value.dtype == self.half for value in data)
            return bool(data) and (rounded or self._all_wanted(node))
        if node.op_type not in _FOLLOW or node in self.exact or not computed:
            return False
        summed = node.op_type in ("Add", "Sub") and len(computed) > 1
        gated = self.half in _SHORT and _is_gated(node.outputs[0])
        return not (summed or gated) and all(
            value.dtype == self.half if constant(value) is None else _is_vector(value)
            for value in data
        )

    def _take(self, node: ir.Node, values: list[ir.Value | None], dtype: ir.DataType) -> None:
        for index, value in enumerate(node.inputs):
            if value in values and value is not None and value.dtype in (FLOAT, self.half):
                node.replace_input_with(index, self._as(value, dtype, node))

    def _as(self, value: ir.Value, dtype: ir.DataType, before: ir.Node) -> ir.Value:
        """Return the value in a type: a constant becomes another constant, the rest is cast,
        once."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.casts:
            stored = constant(value)
            if stored is not None and dtype == self.half:
                self.casts[value, dtype] = self._rounded(stored)
            else:
                node = _cast(value, dtype, f"{value.name}.{dtype.name.lower()}")
                self.graph.insert_before(before, node)
                self.casts[value, dtype] = node.outputs[0]
        return self.casts[value, dtype]

    def _rounded(self, stored: ir.Value) -> ir.Value:
        if stored.dtype == self.half:  # 16 bit behind a Cast: as it is
            return stored
        assert stored.const_value is not None
        name = f"{stored.name}.{self.half.name.lower()}"
        value = ir.Value(name=name, shape=stored.shape, type=ir.TensorType(self.half))
        value.const_value = ir.LazyTensor(
            _rounder(stored.const_value, self.stage, str(stored.name), self.half),
            dtype=self.half,
            shape=ir.Shape(stored.const_value.shape.numpy()),
            name=name,
        )
        self.graph.register_initializer(value)
        return value

    def _door(self, value: ir.Value) -> ir.Value:
        name, value.name = value.name, f"{value.name}.{self.half.name.lower()}"
        node = _cast(value, FLOAT, str(name))
        producer = value.producer()
        assert producer is not None
        self.graph.insert_after(producer, node)
        return node.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype.value}, name=f"node_{name}")
    node.outputs[0].name, node.outputs[0].shape = name, value.shape
    node.outputs[0].type = ir.TensorType(dtype)
    return node


def _rounder(
    tensor: ir.TensorProtocol, stage: str, name: str, half: ir.DataType
) -> Callable[[], ir.TensorProtocol]:
    def rounded() -> ir.TensorProtocol:
        wide = tensor.numpy().astype(np.float32)
        if half in _SHORT and np.abs(wide).max(initial=0.0) > np.finfo(half.numpy()).max:
            raise CompileError(
                f"engine `{stage}`: {name} reaches {np.abs(wide).max():.3g}, beyond the range of "
                f"{half.name.lower()}",
                hint=f"compile with --compute {HALF.name}, whose range is that of {FULL.dtype}",
            )
        return ir.Tensor(wide.astype(half.numpy()), dtype=half)

    return rounded


def _data(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the inputs that hold values; shapes, indices and axes come behind them."""
    first_alone = node.op_type in _MOVES and node.op_type != "Concat"
    for value in node.inputs[:1] if first_alone else node.inputs:
        if value is not None:
            yield value


def _attention_scale(node: ir.Node) -> float:
    """Return what an attention multiplies Q·K with: its attribute, or one over the root of the
    width."""
    if (given := node.attributes.get("scale")) is not None:
        return float(given.value)
    query, heads = node.inputs[0], node.attributes.get("q_num_heads")
    assert query is not None
    assert query.shape is not None, query.name
    width = query.shape[-1]
    assert isinstance(width, int), query.name
    return 1 / math.sqrt(width // int(heads.value) if heads is not None else width)


def _is_float(value: ir.Value) -> bool:
    return value.dtype == FLOAT


def _is_vector(value: ir.Value) -> bool:
    shape = value.shape
    return shape is not None and sum(dim != 1 for dim in shape) <= 1


def _is_gated(value: ir.Value | None) -> bool:
    """Say whether a value is the product of two computed ones of which none is bounded."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Mul" or any(constant(v) is not None for v in node.inputs):
        return False
    makers = [v.producer() for v in node.inputs if v is not None]
    return not any(maker is not None and maker.op_type in _BOUNDED for maker in makers)
