"""The two operations of a quantised layer: as torch computes them, and as ONNX writes them.

int8 and fp8 are ONNX's own QuantizeLinear and DequantizeLinear. NVFP4 is written as two functions
of the model itself, built from standard operators: onnxruntime has no kernels for E2M1, and runs
them as a simulation; the compiler for RTX cards puts its own operators in their place.

int8 activations are unsigned with zero point 128, which is what onnxruntime wants on x86 and what
OpenVINO takes as well; `export/compile/quantized.py` rewrites them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from onnxscript import opset23 as op
from torch import Tensor

from export.quantize import formats
from export.quantize.formats import E2M1_MAX, E2M1_VALUES, E4M3_MAX, SMALLEST

DOMAIN = onnxscript.values.Opset("bifrost", 1)
BLOCK = 16
FP8 = onnx.TensorProto.FLOAT8E4M3FN
FLOAT = onnx.TensorProto.FLOAT
INT32 = onnx.TensorProto.INT32
E2M1 = [*E2M1_VALUES, *(-value for value in E2M1_VALUES)]
STORED = ["tensor(float)", "tensor(uint8)", "tensor(float8e4m3fn)"]


@torch.library.custom_op("bifrost::round_activations", mutates_args=())
def round_activations(x: Tensor, scale: Tensor, form: str) -> Tensor:
    """See `formats.round_activations`."""
    return formats.round_activations(x, scale, form)


@round_activations.register_fake
def _(x: Tensor, scale: Tensor, form: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("bifrost::dequantise", mutates_args=())
def dequantise(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, form: str) -> Tensor:
    """See `formats.dequantised`."""
    return formats.dequantised(codes, scale, tensor_scale, form)


@dequantise.register_fake
def _(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, form: str) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


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
    wide = op.Mul(op.Cast(op.Cast(wanted, to=FP8), to=FLOAT), scale)
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


def _call(name: str, *inputs: Any) -> Any:
    """A node of one of the model's own functions; `add_functions` gives the model their bodies.

    The exporter would write the bodies out in place of the call, if it knew them.
    """
    parameter = onnx.defs.OpSchema.FormalParameter
    schema = onnx.defs.OpSchema(
        name,
        DOMAIN.domain,
        1,
        inputs=[parameter(f"input{i}", f"T{i}") for i in range(len(inputs))],
        outputs=[parameter("output", "tensor(float)")],
        type_constraints=[(f"T{i}", STORED, "") for i in range(len(inputs))],
    )
    return onnxscript.values.Op(DOMAIN, name, schema)(*inputs)


def _round_activations(x: Any, scale: Any, form: str) -> Any:
    if form == "nvfp4":
        return _call("NVFP4QuantizeDequantize", x, scale)
    if form == "fp8":
        quantised = op.QuantizeLinear(x, scale, output_dtype=FP8)
        return op.DequantizeLinear(quantised, scale)
    zero = op.Constant(value=onnx.helper.make_tensor("zero", onnx.TensorProto.UINT8, [], [128]))
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)


def _dequantise(codes: Any, scale: Any, tensor_scale: Any, form: str) -> Any:
    block = formats.FORMATS[form].block
    if form == "nvfp4":
        return _call("NVFP4Dequantize", codes, scale, tensor_scale)
    if block is None:
        return op.DequantizeLinear(codes, scale, axis=1)
    return op.DequantizeLinear(codes, op.Cast(scale, to=FLOAT), axis=0, block_size=block)


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.bifrost.round_activations.default: _round_activations,
    torch.ops.bifrost.dequantise.default: _dequantise,
}


def add_functions(model: ir.Model) -> None:
    """Give a model the bodies of the functions that its nodes call."""
    called = {node.op_type for node in model.graph if node.domain == DOMAIN.domain}
    for function in (NVFP4QuantizeDequantize, NVFP4Dequantize):
        if function.name in called:
            body = ir.serde.deserialize_function(function.to_function_proto())
            model.functions[body.identifier()] = body
            model.opset_imports[DOMAIN.domain] = 1


def pack(model: ir.Model) -> None:
    """Store codes of four bits in four bits: torch has no such type."""
    for value in model.graph.initializers.values():
        stored = {"int4": ir.DataType.INT4, "nvfp4": ir.DataType.UINT4}.get(_form(value) or "")
        if stored is None:
            continue
        codes = value.const_value
        assert codes is not None
        value.const_value = ir.LazyTensor(
            functools.partial(_packed, codes, stored), stored, codes.shape, name=value.name
        )
        value.type = ir.TensorType(stored)


def _packed(codes: ir.TensorProtocol, stored: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(codes.numpy().astype(stored.numpy()), dtype=stored, name=codes.name)


def _form(value: ir.Value) -> str | None:
    """The format of a value that holds codes, from the operator that reads it."""
    for node, index in value.uses():
        if index == 0 and node.op_type == "NVFP4Dequantize":
            return "nvfp4"
        if index == 0 and node.op_type == "DequantizeLinear":
            return "int4" if node.attributes.get_int("block_size", 0) else None
    return None
