"""Quantized layers in a graph: what `QuantizedLinear` computes, in ONNX's operators.

int8 and fp8 are ONNX's own QuantizeLinear and DequantizeLinear. NVFP4 is written as two functions
of the model itself, built from standard operators: onnxruntime has no kernels for E2M1, and runs
them as a simulation; the compiler for RTX cards puts its own operators in their place.

int8 activations are unsigned with zero point 128, which is what onnxruntime wants on x86 and what
OpenVINO takes as well; `export/compile/quantized.py` rewrites them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxscript
from onnx_ir.tensor_adapters import TorchTensor
from onnxscript import opset23 as op

from export import lazy_tensors
from export.errors import ExportError
from export.initializers import Weight
from export.quantize.formats import FORMATS
from export.quantize.linear import QuantizedLinear
from export.quantize.rounding import E2M1_MAX, E2M1_VALUES, E4M3_MAX, SMALLEST

DOMAIN = onnxscript.values.Opset("bifrost", 1)
BLOCK = 16
E4M3 = onnx.TensorProto.FLOAT8E4M3FN
FLOAT = onnx.TensorProto.FLOAT
INT32 = onnx.TensorProto.INT32
E2M1 = [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
ZERO_POINT = "zero_point.uint8"


# The bodies are read by onnxscript, which knows a few forms of Python: constants are made here.


@onnxscript.script(DOMAIN, default_opset=op)
def NVFP4QuantizeDequantize(x, scale):
    """x [..., K], scale []: the block scales' unit -> x, rounded block by block."""
    one = op.Constant(value_float=1.0)
    two = op.Constant(value_float=2.0)
    four = op.Constant(value_float=4.0)
    top = op.Constant(value_float=E2M1_MAX)
    blocks = op.Reshape(x, op.Constant(value_ints=[-1, BLOCK]))
    largest = op.ReduceMax(op.Abs(blocks), op.Constant(value_ints=[1]), keepdims=1)
    wanted = op.Min(op.Div(op.Div(largest, top), scale), op.Constant(value_float=E4M3_MAX))
    wide = op.Mul(op.Cast(op.Cast(wanted, to=E4M3), to=FLOAT), scale)
    v = op.Div(blocks, op.Max(wide, op.Constant(value_float=SMALLEST)))
    magnitude = op.Min(op.Abs(v), top)
    coarse = op.Where(op.Less(magnitude, four), one, two)
    step = op.Where(op.Less(magnitude, two), op.Constant(value_float=0.5), coarse)
    rounded = op.Mul(op.Mul(op.Round(op.Div(magnitude, step)), step), op.Sign(v))
    return op.Reshape(op.Mul(rounded, wide), op.Shape(x))


@onnxscript.script(DOMAIN, default_opset=op)
def NVFP4Dequantize(codes, block_scale, tensor_scale):
    """codes [K, N], block scales [K / 16, N] -> float [K, N]."""
    values = op.Gather(op.Constant(value_floats=E2M1), op.Cast(codes, to=INT32))
    shape = op.Shape(values)
    outputs = op.Slice(shape, op.Constant(value_ints=[1]), op.Constant(value_ints=[2]))
    blocks = op.Reshape(values, op.Concat(op.Constant(value_ints=[-1, BLOCK]), outputs, axis=0))
    scale = op.Mul(op.Cast(block_scale, to=FLOAT), tensor_scale)
    return op.Reshape(op.Mul(blocks, op.Unsqueeze(scale, op.Constant(value_ints=[1]))), shape)


FUNCTIONS = (NVFP4QuantizeDequantize, NVFP4Dequantize)


def quantize(model: ir.Model, layers: Mapping[str, QuantizedLinear]) -> None:
    """Write quantized layers where a graph has the linear layers that they stand for.

    Args:
        layers: path of a layer, which the initializer of its weight is named by.

    Raises:
        ExportError: a weight has a use that is not that of a linear layer.
    """
    rounded: Rounded = {}
    for path, layer in layers.items():
        weight = model.graph.initializers.get(f"{path}.weight")
        if weight is not None:  # tied to another, or not reached
            _Writer(model.graph, path, layer, rounded).write(weight)
            del model.graph.initializers[f"{path}.weight"]
    _add_functions(model)


# A value and what is done to it -> what is left of it. Layers that read one input, such as those of
# queries, keys and values, mostly round it alike: it is done once.
Rounded = dict[tuple[ir.Value, str, str | None, str | None], ir.Value]


class _Writer:
    """One layer."""

    def __init__(
        self, graph: ir.Graph, path: str, layer: QuantizedLinear, rounded: Rounded
    ) -> None:
        self.graph, self.path, self.layer, self.fmt = graph, path, layer, layer.fmt
        self._rounded = rounded

    def write(self, weight: ir.Value) -> None:
        """Replace every use of the layer's weight [N, K]."""
        wide: ir.Value | None = None
        for product in list(self._products(weight)):
            before: list[ir.Node] = []
            x, y = product.inputs[0], product.outputs[0]
            assert x is not None
            if wide is None:
                wide = self._dequantized(before)
            new = ir.node("MatMul", [self._round(x), wide])
            last = [new]
            if product.op_type == "Gemm" and len(product.inputs) > 2:
                new.outputs[0].name = f"{y.name}.product"
                new.outputs[0].shape, new.outputs[0].type = y.shape, y.type
                last.append(ir.node("Add", [new.outputs[0], product.inputs[2]]))
            found = last[-1].outputs[0]
            found.shape, found.type, name = y.shape, y.type, y.name
            y.name = f"{name}.replaced"
            found.name = name
            self.graph.insert_before(product, [*before, *last])
            y.replace_all_uses_with(found, replace_graph_outputs=True)
            self.graph.remove(product, safe=True)
        for node in [node for node, _ in weight.uses()]:
            self.graph.remove(node, safe=True)

    def _products(self, weight: ir.Value) -> Iterator[ir.Node]:
        for node, index in weight.uses():
            if node.op_type == "Gemm" and index == 1 and _is_plain(node):
                yield node
                continue
            if node.op_type != "Transpose":
                raise self._unexpected(node)
            for product, place in node.outputs[0].uses():
                if product.op_type != "MatMul" or place != 1:
                    raise self._unexpected(product)
                yield product

    def _unexpected(self, node: ir.Node) -> ExportError:
        return ExportError(
            f"layer {self.path}: its weight is read by {node.op_type}, expected the MatMul of a "
            f"linear layer; keep the layer in 16 bit"
        )

    def _round(self, x: ir.Value) -> ir.Value:
        """Return the activations, after their format."""
        key = (x, self.fmt, self._identity("smoothing"), self._identity("input_scale"))
        if key not in self._rounded:
            into: list[ir.Node] = []
            self._rounded[key] = self._round_into(into, x)
            maker = x.producer()
            if into and maker is not None:
                self.graph.insert_after(maker, into)
            elif into:  # an input of the graph
                self.graph.insert_before(self.graph[0], into)
        return self._rounded[key]

    def _round_into(self, into: list[ir.Node], x: ir.Value) -> ir.Value:
        layer, name = self.layer, f"{x.name}.for.{self.path}"
        if layer.smoothing is not None:
            x = self._add(into, "Mul", [x, self._initializer("smoothing")], f"{name}.moved", x)
        if layer.input_scale is None:
            return x
        scale = self._initializer("input_scale")
        rounded = FORMATS[self.fmt].inputs[0]
        if any(rounded == function.name for function in FUNCTIONS):
            return self._add(into, rounded, [x, scale], name, x, domain=DOMAIN.domain)
        codes = ir.DataType[rounded.upper()]
        unsigned = codes == ir.DataType.UINT8
        point = [self._zero_point()] if unsigned else []
        attributes = {} if unsigned else {"output_dtype": codes.value}
        stored = self._add(
            into, "QuantizeLinear", [x, scale, *point], f"{name}.codes", x, codes, attributes
        )
        return self._add(into, "DequantizeLinear", [stored, scale, *point], name, x)

    def _dequantized(self, into: list[ir.Node]) -> ir.Value:
        """Return the weight [K, N] in float32."""
        codes, scale = self._initializer("codes"), self._initializer("scale")
        block, name = FORMATS[self.fmt].block, f"{self.path}.dequantized"
        if (function := FORMATS[self.fmt].weight_function) is not None:
            inputs = [codes, scale, self._initializer("tensor_scale")]
            return self._add(into, function, inputs, name, codes, domain=DOMAIN.domain)
        if block is None:
            return self._add(
                into, "DequantizeLinear", [codes, scale], name, codes, attributes={"axis": 1}
            )
        wide = self._add(
            into, "Cast", [scale], f"{self.path}.scale.float32", scale, attributes={"to": FLOAT}
        )
        attributes = {"axis": 0, "block_size": block}
        return self._add(
            into, "DequantizeLinear", [codes, wide], name, codes, attributes=attributes
        )

    def _add(
        self,
        into: list[ir.Node],
        operator: str,
        inputs: Sequence[ir.Value],
        name: str,
        like: ir.Value,
        dtype: ir.DataType = ir.DataType.FLOAT,
        attributes: Mapping[str, Any] | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Return a node, whose output has the shape of `like`."""
        node = ir.node(operator, inputs, attributes, domain=domain)
        found = node.outputs[0]
        found.name, found.shape, found.type = name, like.shape, ir.TensorType(dtype)
        into.append(node)
        return found

    def _identity(self, part: str) -> str | None:
        absent = getattr(self.layer, part) is None
        return None if absent else lazy_tensors.of(self.layer, part).identity

    def _initializer(self, part: str) -> ir.Value:
        name = f"{self.path}.{part}"
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        source = lazy_tensors.of(self.layer, part)
        stored = TorchTensor(lazy_tensors.get(self.layer, part)).dtype
        tensor: ir.TensorProtocol = Weight(source, stored, name)
        if part == "codes" and FORMATS[self.fmt].packed:
            stored = ir.DataType[FORMATS[self.fmt].stored.upper()]
            tensor = ir.LazyTensor(
                functools.partial(_packed, tensor, stored), stored, tensor.shape, name=name
            )
        return self._register(name, tensor)

    def _zero_point(self) -> ir.Value:
        if ZERO_POINT in self.graph.initializers:
            return self.graph.initializers[ZERO_POINT]
        return self._register(ZERO_POINT, ir.tensor(np.array(128, np.uint8), name=ZERO_POINT))

    def _register(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value


def _is_plain(gemm: ir.Node) -> bool:
    """Say whether it is x @ weight.T + bias."""
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    given = {name: gemm.attributes[name].value for name in plain if name in gemm.attributes}
    return {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0, **given} == plain


def _packed(codes: ir.TensorProtocol, stored: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(codes.numpy().astype(stored.numpy()), dtype=stored, name=codes.name)


def _add_functions(model: ir.Model) -> None:
    """Give a model the bodies of the functions that its nodes call."""
    called = {node.op_type for node in model.graph if node.domain == DOMAIN.domain}
    for function in FUNCTIONS:
        if function.name in called:
            body = ir.serde.deserialize_function(function.to_function_proto())
            body.opset_imports[""] = model.opset_imports[""]  # the checker wants one for both
            model.functions[body.identifier()] = body
            model.opset_imports[DOMAIN.domain] = 1
