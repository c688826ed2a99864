"""Quantized layers in the form that TensorRT knows, from the form that runs on a CPU.

The numbers stay the same ones. TensorRT wants 8-bit activations signed with zero point 0 where
onnxruntime wants them unsigned with zero point 128, and it has operators of its own for NVFP4,
which the graphs write as two functions of standard operators.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN = "bifrost"
BLOCK = 16
_UINT8, _INT8 = ir.DataType.UINT8, ir.DataType.INT8
_FORMATS = {
    _UINT8: "int8",
    _INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}
_FP4, _FP8 = ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN


def formats(model: ir.Model) -> set[str]:
    """Return which of int8, fp8, nvfp4 and int4 a graph's layers are quantized to."""
    found = set()
    for node in model.graph:
        if node.domain == DOMAIN or node.op_type == "TRT_FP4DynamicQuantize":
            found.add("nvfp4")
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            types = (value.dtype for value in (*node.inputs[:1], *node.outputs) if value)
            found |= {_FORMATS[dtype] for dtype in types if dtype in _FORMATS}
    return found


def rewrite(model: ir.Model) -> None:
    """Rewrite a graph in place; one without quantized layers stays as it is."""
    graph = model.graph
    zero: ir.Value | None = None
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == "NVFP4QuantizeDequantize":
            _fp4_activations(graph, node)
        elif node.domain == DOMAIN and node.op_type == "NVFP4Dequantize":
            _fp4_weight(graph, node)
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.inputs) > 2:
            point = node.inputs[2]
            if point is not None and point.dtype == _UINT8 and _value(point) == 128:
                zero = zero or _zero(graph)
                node.replace_input_with(2, zero)
                if node.op_type == "QuantizeLinear":
                    node.outputs[0].dtype = _INT8
    for name in [identifier for identifier in model.functions if identifier[0] == DOMAIN]:
        del model.functions[name]
    model.opset_imports.pop(DOMAIN, None)
    if any(node.domain == "trt" for node in graph):
        model.opset_imports["trt"] = 1
    RemoveUnusedNodesPass()(model)


def _value(point: ir.Value) -> int | None:
    tensor = point.const_value
    return None if tensor is None or tensor.size != 1 else int(tensor.numpy().reshape(-1)[0])


def _zero(graph: ir.Graph) -> ir.Value:
    value = ir.Value(
        name="zero_point.int8",
        shape=ir.Shape([]),
        type=ir.TensorType(_INT8),
        const_value=ir.tensor(np.zeros((), np.int8)),
    )
    graph.register_initializer(value)
    return value


def _fp4_activations(graph: ir.Graph, node: ir.Node) -> None:
    """Block by block: a scale in 8 bit, a unit of `scale`, and codes of 4 bits."""
    x, scale = node.inputs
    assert x is not None
    assert scale is not None
    name = node.outputs[0].name
    attributes = {"axis": -1, "block_size": BLOCK, "scale_type": _FP8.value}
    quantize = ir.node(
        "TRT_FP4DynamicQuantize", [x, scale], attributes, domain="trt", num_outputs=2
    )
    codes, blocks = quantize.outputs
    codes.name, codes.shape, codes.type = f"{name}.codes", x.shape, ir.TensorType(_FP4)
    blocks.name, blocks.type = f"{name}.blocks", ir.TensorType(_FP8)
    _dequantize(graph, node, (codes, blocks, scale), -1, [quantize])


def _fp4_weight(graph: ir.Graph, node: ir.Node) -> None:
    """Codes [K, N] and scales of 16 of the K: the bits of a code are those of its E2M1 number."""
    codes, blocks, scale = node.inputs
    assert codes is not None
    assert blocks is not None
    assert scale is not None
    stored = codes.const_value
    assert stored is not None
    same = ir.Value(
        name=f"{codes.name}.e2m1",
        shape=codes.shape,
        type=ir.TensorType(_FP4),
        const_value=ir.LazyTensor(
            functools.partial(_as_e2m1, stored),
            _FP4,
            ir.Shape(stored.shape.numpy()),
            name=f"{codes.name}.e2m1",
        ),
    )
    graph.register_initializer(same)
    _dequantize(graph, node, (same, blocks, scale), 0, [])


def _as_e2m1(codes: ir.TensorProtocol) -> ir.Tensor[Any]:
    return ir.Tensor(codes.numpy().astype(np.uint8).view(_FP4.numpy()), dtype=_FP4)


def _dequantize(
    graph: ir.Graph,
    node: ir.Node,
    of: tuple[ir.Value, ir.Value, ir.Value],
    axis: int,
    before: list[ir.Node],
) -> None:
    """Put codes · (blocks · scale) in the place of a node."""
    codes, blocks, scale = of
    old = node.outputs[0]
    wide = ir.node("DequantizeLinear", [blocks, scale])
    wide.outputs[0].name, wide.outputs[0].type = f"{old.name}.scales", old.type
    attributes = {"axis": axis, "block_size": BLOCK}
    new = ir.node("DequantizeLinear", [codes, wide.outputs[0]], attributes)
    new.outputs[0].shape, new.outputs[0].type = old.shape, old.type
    name = old.name
    old.name = f"{name}.replaced"
    new.outputs[0].name = name
    graph.insert_before(node, [*before, wide, new])
    old.replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)
