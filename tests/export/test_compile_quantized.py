"""Quantized layers, from the form that runs on a CPU to engines: rewritten without a changed
number, refused where a card has no such arithmetic, and what they compute in read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from bifrost_rt import memory_plan
from bifrost_rt.manifest import EngineSpec, Precision, TensorSpec
from export.compile import bound, capabilities, compiled_set, graphs, mixed_precision, quantized
from export.compile import builder as builders
from export.compile.profiles import Sizes
from export.errors import CompileError
from export.stages.catalog import DEFINITIONS
from tests.export import plans
from tests.export.quantize.test_graphs import built

K, N = 64, 128
SPEC = EngineSpec(
    "denoise",
    "",
    (),
    (TensorSpec("x", "float32", ("images", 16, K)),),
    (TensorSpec("y", "float32", ("images", 16, N)),),
    {},
    Precision("", "", ""),
)
DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn", "nvfp4": "float4_e2m1fn", "int4": "int4"}
RTX_BUILDER = "tensorrt-rtx"
FP8, UINT4, INT4 = ir.DataType.FLOAT8E4M3FN, ir.DataType.UINT4, ir.DataType.INT4


class Layer:
    """y = round(x) @ dequantize(weight) + bias, as `export.build` writes it."""

    def __init__(self, fmt: str) -> None:
        shape = ir.Shape(["images", 16, K])
        self._numbers = np.random.default_rng(0)
        x = ir.Value(name="x", shape=shape, type=ir.TensorType(mixed_precision.FLOAT))
        self._graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23, "bifrost": 1}, name="g")
        rounded = self._activations(fmt, x)
        weight = self._weight(fmt)
        product = self._node("MatMul", [rounded, weight], (*shape[:2], N))
        bias = self._constant("bias", self._numbers.normal(size=N).astype(np.float32))
        y = self._node("Add", [product, bias], (*shape[:2], N))
        y.name = "y"
        self._graph.outputs.append(y)
        self.model = ir.Model(self._graph, ir_version=11)

    def _activations(self, fmt: str, x: ir.Value) -> ir.Value:
        assert x.shape is not None
        shape = tuple(x.shape)
        scale = self._constant("input_scale", np.array(0.02, np.float32))
        if fmt == "int4":
            return x
        if fmt == "nvfp4":
            return self._node("NVFP4QuantizeDequantize", [x, scale], shape, domain="bifrost")
        inputs, attributes = [x, scale], {"output_dtype": FP8.value}
        if fmt == "int8":
            zero = self._constant("zero", np.array(128, np.uint8))
            inputs, attributes = [x, scale, zero], {}
        codes = self._node("QuantizeLinear", inputs, shape, attributes)
        codes.dtype = ir.DataType.UINT8 if fmt == "int8" else FP8
        return self._node("DequantizeLinear", [codes, *inputs[1:]], shape)

    def _weight(self, fmt: str) -> ir.Value:
        whole = self._numbers.integers(-7, 8, (K, N))
        if fmt == "nvfp4":
            codes = self._constant("codes", (whole + 8).astype(ml_dtypes.uint4), UINT4)
            scale = np.abs(self._numbers.normal(size=(K // 16, N))).astype(ml_dtypes.float8_e4m3fn)
            inputs = [codes, self._constant("scale", scale)]
            inputs.append(self._constant("tensor_scale", np.array(0.01, np.float32)))
            return self._node("NVFP4Dequantize", inputs, (K, N), domain="bifrost")
        if fmt == "int4":
            codes = self._constant("codes", whole.astype(ml_dtypes.int4), INT4)
            scale = self._constant("scale", np.full((K // 32, N), 0.01, np.float32))
            attributes = {"axis": 0, "block_size": 32}
        else:
            dtype = np.int8 if fmt == "int8" else ml_dtypes.float8_e4m3fn
            codes = self._constant("codes", whole.astype(dtype))
            scale = self._constant("scale", np.full(N, 0.01, np.float32))
            attributes = {"axis": 1}
        return self._node("DequantizeLinear", [codes, scale], (K, N), attributes)

    def _constant(
        self, name: str, array: NDArray[Any], dtype: ir.DataType | None = None
    ) -> ir.Value:
        tensor = ir.Tensor(array, dtype=dtype, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def _node(
        self,
        operator: str,
        inputs: list[ir.Value],
        shape: tuple[Any, ...],
        attributes: dict[str, int] | None = None,
        domain: str = "",
    ) -> ir.Value:
        node = ir.node(operator, inputs, attributes or {}, domain=domain)
        self._graph.append(node)
        made = node.outputs[0]
        made.name, made.shape = f"{operator}.{len(self._graph)}", ir.Shape(shape)
        made.type = ir.TensorType(mixed_precision.FLOAT)
        return made


def compiled(fmt: str, target: str, compute: str = "bfloat16", *, bind: bool = False) -> Any:
    model = Layer(fmt).model
    quantized.rewrite(model)
    mixed_precision.convert(model, DEFINITIONS["denoise"], compute)
    names = {str(tensor.name) for tensor in bound.bind(model)} if bind else set()
    sizes = Sizes({"images": (1, 2)})
    builder = builders.find(RTX_BUILDER)
    return builders.compile_graph(builder, model, SPEC, sizes, (target,), names)


@pytest.mark.parametrize("fmt", list(DTYPES))
def test_what_a_graph_is_quantized_to(fmt: str) -> None:
    assert quantized.formats(Layer(fmt).model) == {fmt}


def test_signed_activations_are_the_unsigned_ones(tmp_path: Path) -> None:
    x = np.random.default_rng(1).normal(size=(1, 16, K)).astype(np.float32) * 3  # some saturate
    found = []
    for rewrite in (False, True):
        model = Layer("int8").model
        if rewrite:
            quantized.rewrite(model)
            dtypes = {n.outputs[0].dtype for n in model.graph if n.op_type == "QuantizeLinear"}
            assert dtypes == {ir.DataType.INT8}
            assert all(v.dtype != ir.DataType.UINT8 for v in model.graph.initializers.values())
        path = tmp_path / f"{rewrite}.onnx"
        ir.save(model, path)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        found.append(ort.InferenceSession(path, options).run(None, {"x": x})[0])
    assert np.array_equal(found[0], found[1])


def test_codes_of_four_bits_are_their_numbers_bits() -> None:
    model = Layer("nvfp4").model
    codes = model.graph.initializers["codes"].const_value
    assert codes is not None
    quantized.rewrite(model)
    (stored,) = [v.const_value for v in model.graph.initializers.values() if "e2m1" in str(v.name)]
    assert stored is not None
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    table = np.concatenate([positive, -positive])
    assert np.array_equal(stored.numpy().astype(np.float32), table[codes.numpy().astype(int)])
    assert stored.nbytes == K * N // 2
    assert {node.domain for node in model.graph} == {"", "trt"}


@pytest.mark.parametrize(
    ("fmt", "target"),
    [("int8", "sm86"), ("int8", "sm120"), ("fp8", "sm89"), ("nvfp4", "sm120"), ("int4", "sm86")],
)
def test_it_compiles_with_16_bit_around_it(fmt: str, target: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    arithmetic = compiled(fmt, target).arithmetic
    # with weights alone in 4 bits, the product is of 16-bit numbers
    assert arithmetic.compute == ("bfloat16" if fmt == "int4" else DTYPES[fmt])
    assert arithmetic.stored == DTYPES[fmt]
    assert arithmetic.weights[DTYPES[fmt]] == K * N * (0.5 if "4" in fmt else 1)
    assert arithmetic.weights["bfloat16"] > 2 * N  # the bias, and scales


@pytest.mark.parametrize("fmt", list(DTYPES))
def test_layers_compile_as_a_build_writes_them(fmt: str, tmp_path: Path) -> None:
    """Traced, stored and read again; a layer in 16 bit behind the quantized one."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    stage, spec = built(tmp_path, fmt)
    graph = graphs.read(tmp_path / spec.graph, spec.name)
    assert quantized.formats(graph) == {fmt}
    quantized.rewrite(graph)
    mixed_precision.convert(graph, stage.definition, "bfloat16")
    builder, sizes = builders.find(RTX_BUILDER), Sizes({"images": (1, 2)})
    found = builders.compile_graph(builder, graph, spec, sizes, ("sm120",)).arithmetic
    weight_only = fmt == "int4"
    expected = {"bfloat16": 2} if weight_only else {DTYPES[fmt]: 1, "bfloat16": 1}
    assert found.products == expected
    assert found.weights[DTYPES[fmt]] >= 512 * 96 * (0.5 if "4" in fmt else 1)


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_weights_of_8_bits_can_be_bound(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    monkeypatch.setattr(bound, "SMALLEST", 1024)
    built = compiled(fmt, "sm120", bind=True)
    assert built.arithmetic.stored == DTYPES[fmt]
    assert touched(built.engine, "codes") == []


@pytest.mark.parametrize("fmt", ["nvfp4", "int4"])
def test_weights_of_4_bits_stay_in_the_engine(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound, they would be laid out or unpacked anew at every step: the plan says so."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    monkeypatch.setattr(bound, "SMALLEST", 64)
    model = Layer(fmt).model
    quantized.rewrite(model)
    mixed_precision.convert(model, DEFINITIONS["denoise"], "bfloat16")
    assert [tensor.name for tensor in bound.bind(model)] == ["bias.bfloat16"]
    built = compiled(fmt, "sm120", bind=True)
    assert built.arithmetic.stored == DTYPES[fmt]
    assert touched(built.engine, "codes") == []
    monkeypatch.setattr(bound, "_FEW_BITS", 0)
    assert touched(compiled(fmt, "sm120", bind=True).engine, "codes") != []


def test_memory_for_weights_that_cannot_be_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_set, "BOUND_FROM", 1024)
    monkeypatch.setattr(memory_plan, "available", lambda: 1000)
    monkeypatch.setattr(bound, "SMALLEST", 64)
    for asked in (None, "bound"):
        with pytest.raises(CompileError, match="`denoise`: compiling its weights") as error:
            compiled_set._Job.prepare(
                Layer("nvfp4").model, SPEC, DEFINITIONS["denoise"], "bfloat16", asked
            )
        assert str(error.value.hint).startswith("free memory, or compile on a larger machine")
        assert compiled_set._Job.prepare(
            Layer("int8").model, SPEC, DEFINITIONS["denoise"], "bfloat16", asked
        ).weights


def touched(engine: Any, weight: str) -> list[str]:
    """The kernels of an engine, products apart, that read a weight."""
    found = plans.kernels(plans.text(bytes(engine)))
    assert found
    return [k.name for k in found if any(name.startswith(weight) for name in k.reads)]


RTX = [name for name, about in capabilities.ARCHITECTURES.items() if RTX_BUILDER in about.builders]


@pytest.mark.parametrize("target", RTX)
@pytest.mark.parametrize("fmt", list(DTYPES))
def test_the_builder_and_the_table_refuse_the_same(fmt: str, target: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    if fmt in capabilities.ARCHITECTURES[target].precisions:
        assert capabilities.check(RTX_BUILDER, [target], [DTYPES[fmt]]) == (target,)
        assert compiled(fmt, target).engine is not None
        return
    with pytest.raises(CompileError, match=f"{target} .* has no {fmt}"):
        capabilities.check(RTX_BUILDER, [target], quantized.formats(Layer(fmt).model))
    with pytest.raises(CompileError, match="HW-specific datatypes"):
        compiled(fmt, target)
