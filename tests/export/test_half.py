"""Graphs that compute in 16 bit: what is rounded, what is not, and what that costs."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from bifrost_rt import Generator, manifest, selftest
from bifrost_rt.manifest import EngineSpec, Precision, TensorSpec
from export.compile import builder as builders
from export.compile import error, graphs, mixed_precision, simulate
from export.compile.profiles import Sizes
from export.engine_set import describe_files
from export.errors import CompileError
from export.stages.catalog import DEFINITIONS
from tests.conftest import load_case
from tests.export import plans

STAGES = tuple(name for name in DEFINITIONS if name != "vae_decode")
TYPES = ("bfloat16", "float16")


def converted(folder: Path, stage: str, compute: str) -> ir.Model:
    model = graphs.read(folder / f"{stage}.onnx", stage)
    mixed_precision.convert(model, DEFINITIONS[stage], compute)
    return model


def types(model: ir.Model, *operators: str) -> Counter[str]:
    return Counter(
        node.outputs[0].dtype.name
        for node in model.graph
        if node.op_type in operators and node.outputs[0].dtype is not None
    )


@pytest.mark.parametrize("compute", TYPES)
def test_every_stage_stays_within_its_tolerance(alpha_set: Path, compute: str) -> None:
    facts = manifest.read(alpha_set)
    types = {spec.name: compute for spec in facts.engines}
    found, deviation = error.measure(alpha_set, facts, types)
    assert found.keys() == {*STAGES, "vae_decode"}
    for record in found.values():
        assert record["max_error"] > 0  # it was rounded
        assert record["tolerance"] <= 0.04 or record["largest_value"] == 255
    bound = selftest.BOUNDS[compute]
    assert bound.psnr < deviation.psnr < 100
    assert 0 < deviation.mean < bound.mean
    few = [record["max_error"] / max(1, record["largest_value"]) for record in found.values()]
    assert min(few) < (1e-3 if compute == "float16" else 1e-2)


@pytest.mark.parametrize(("compute", "decibels"), [("float16", 58.0), ("bfloat16", 48.0)])
def test_the_image_is_still_the_recorded_one(
    alpha_set: Path, tmp_path: Path, compute: str, decibels: float
) -> None:
    """Through both loops; case 07 is the worst of the eight, by 60.7 and 50.8 dB."""
    case, facts = load_case("case_07"), manifest.read(alpha_set)
    shutil.copytree(alpha_set / "tokenizers", tmp_path / "tokenizers")
    for spec in facts.engines:
        error.simulated(alpha_set, tmp_path, spec, DEFINITIONS[spec.name], compute)
    engines = tuple(
        dataclasses.replace(spec, files=(spec.graph, f"{spec.name}.simulated"))
        for spec in facts.engines
    )
    facts = dataclasses.replace(facts, engines=engines, files=describe_files(tmp_path))
    (tmp_path / manifest.FILENAME).write_bytes(facts.dumps())
    with Generator(tmp_path) as generator:
        found = generator.run(**case.request(), output_type="np").images.astype(np.float64)
    noise = np.mean((found - case.tensors["flux.image_u8"]) ** 2)
    assert 10 * np.log10(255**2 / noise) > decibels


def test_a_stage_beyond_its_tolerance_is_refused(alpha_set: Path) -> None:
    facts = manifest.read(alpha_set)
    strict = dataclasses.replace(DEFINITIONS["denoise"], half_tolerance={"bfloat16": 1e-6})
    definitions = {**DEFINITIONS, "denoise": strict}
    with pytest.raises(CompileError, match="in 16 bit, engine `denoise`: differs from its float32"):
        error.measure(
            alpha_set, facts, {spec.name: "bfloat16" for spec in facts.engines}, definitions
        )


@pytest.mark.parametrize("compute", TYPES)
@pytest.mark.parametrize("stage", [*STAGES, "vae_decode"])
def test_products_are_rounded_and_sums_and_doors_are_not(
    alpha_set: Path, tmp_path: Path, stage: str, compute: str
) -> None:
    model = converted(alpha_set, stage, compute)
    name = mixed_precision.TYPES[compute].name
    assert types(model, "Attention", "MatMul", "Conv")[name] > 1
    assert set(types(model, "Attention")) <= {name}
    assert set(types(model, "RMSNormalization", "LayerNormalization", "Cos")) <= {"FLOAT"}
    spec = manifest.read(alpha_set).engine(stage)
    for values, doors in ((model.graph.inputs, spec.inputs), (model.graph.outputs, spec.outputs)):
        for value, door in zip(values, doors, strict=True):
            assert value.dtype is not None
            assert (value.name, value.dtype.numpy().name) == (door.name, door.dtype)
    for node in model.graph:
        if node.op_type == "Add" and node.outputs[0].dtype == mixed_precision.TYPES[compute]:
            assert any(
                mixed_precision.constant(value) is not None for value in node.inputs
            )  # a bias
    ir.save(model, tmp_path / "graph.onnx", external_data="graph.data")
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)


@pytest.mark.parametrize("compute", TYPES)
def test_attention_is_scaled_in_float32_before_q_is_rounded(alpha_set: Path, compute: str) -> None:
    """A parser would multiply Q and K by the scale's root, rounded to their type."""
    for stage in (*STAGES[:4], "denoise", "vae_decode"):
        before = {
            n.name: n for n in graphs.read(alpha_set / f"{stage}.onnx", stage).graph.all_nodes()
        }
        attentions = [n for n in converted(alpha_set, stage, compute).graph if is_attention(n)]
        assert attentions
        for node in attentions:
            assert node.attributes["scale"].value == 1.0
            asked = before[node.name].attributes.get("scale")
            query = node.inputs[0]
            assert query is not None
            assert query.shape is not None
            width = query.shape[-1]
            assert isinstance(width, int)
            expected = float(asked.value) if asked else width**-0.5
            while (maker := query.producer()).op_type in ("Transpose", "Reshape"):
                (query, *_) = maker.inputs
            if expected == 1.0:  # T5 has none
                assert maker.op_type != "Cast"
                continue
            assert maker.op_type == "Cast"  # of what was scaled
            scaled = maker.inputs[0].producer()
            factor = mixed_precision.constant(scaled.inputs[1])
            assert (scaled.op_type, scaled.outputs[0].dtype) == ("Mul", mixed_precision.FLOAT)
            assert factor.dtype == mixed_precision.FLOAT
            assert float(factor.const_value.numpy()) == pytest.approx(expected, rel=1e-7)


def is_attention(node: ir.Node) -> bool:
    return node.op_type == "Attention"


@pytest.mark.parametrize("compute", TYPES)
def test_an_engine_scales_q_alone_and_its_attention_is_one_kernel(compute: str) -> None:
    """Read from the plan inside it."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    model = head()
    mixed_precision.convert(model, DEFINITIONS["denoise"], compute)
    engine, other = engine_of(model), engine_of(head(mixed_precision.TYPES[compute].value))
    plan = plans.text(engine)
    (scaling,) = [kernel for kernel in plans.kernels(plan) if "Mul" in kernel.name]
    assert scaling.reads[0] == "q.1"
    assert [kernel.name for kernel in plans.kernels(plan) if "mha" in kernel.name]
    assert list(plans.constants(plan).values()) == ["float"]
    exact = np.float32(128**-0.5).tobytes()
    assert exact in engine
    assert exact not in other  # where the parser scales, the number is a rounded one


def head(cast: int | None = None) -> ir.Model:
    """Attention of FLUX's width.

    Args:
        cast: the type that its inputs are cast to, which leaves its scale to the parser.
    """
    side = "float[1, 2, 16, 128]"
    body = "y = Attention(q, k, v)"
    if cast is not None:
        casts = (
            f"{to} = Cast <to={cast}> ({value})" for to, value in zip("abc", "qkv", strict=True)
        )
        body = "\n".join((*casts, "d = Attention(a, b, c)", "y = Cast <to=1> (d)"))
    return ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 23]>
        attend ({side} q, {side} k, {side} v) => ({side} y) {{ {body} }}
    """)


def engine_of(model: ir.Model) -> bytes:
    doors = [
        tuple(TensorSpec(str(v.name), "float32", (1, 2, 16, 128)) for v in side)
        for side in (model.graph.inputs, model.graph.outputs)
    ]
    spec = EngineSpec("denoise", "", (), *doors, {}, Precision("", "", ""))
    builder = builders.find("tensorrt-rtx")
    return bytes(builders.compile_graph(builder, model, spec, Sizes({}), ("sm89",)).engine)


def test_the_layers_that_a_stage_names_stay_float32(alpha_set: Path) -> None:
    denoise = converted(alpha_set, "denoise", "bfloat16")
    assert types(denoise, "MatMul")["FLOAT"] == 3  # two embedders of the latents, one way out
    vae = converted(alpha_set, "vae_decode", "bfloat16")
    assert types(vae, "Conv")["FLOAT"] == 2
    conditioning = converted(alpha_set, "conditioning", "bfloat16")
    embedders = [node for node in conditioning.graph if node.op_type == "Gemm"]
    assert embedders
    assert all(node.outputs[0].dtype == mixed_precision.FLOAT for node in embedders)


def test_a_graph_of_16_bit_weights_uses_them_as_they_are(alpha_set: Path, tmp_path: Path) -> None:
    """Behind the Cast lie the very numbers; a second rounding would lose nothing but time."""
    model = graphs.read(alpha_set / "t5_text.onnx", "t5_text")
    for value in list(model.graph.initializers.values()):
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype == mixed_precision.FLOAT and len(tensor.shape) == 2:
            store_in_bfloat16(model.graph, value)
    mixed_precision.convert(model, DEFINITIONS["t5_text"], "bfloat16")
    matrices = [v for v in model.graph.initializers.values() if len(v.shape or ()) == 2]
    tables = {ir.DataType.INT64}  # of T5's relative positions
    assert {v.dtype for v in matrices} - tables == {ir.DataType.BFLOAT16}
    assert not any(
        node.op_type == "Cast" and mixed_precision.constant(node.inputs[0]) is not None
        for node in model.graph
    )


def test_weights_behind_a_cast_are_held_in_float32(alpha_set: Path, tmp_path: Path) -> None:
    """In the network of a 16-bit set that shall compute in float32."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    model = graphs.read(alpha_set / "t5_text.onnx", "t5_text")
    whole = graphs.weight_bytes(model)
    for value in list(model.graph.initializers.values()):
        if value.dtype == mixed_precision.FLOAT and len(value.shape or ()) == 2:
            store_in_bfloat16(model.graph, value)
    assert graphs.weight_bytes(model) == whole
    spec = manifest.read(alpha_set).engine("t5_text")
    sizes = Sizes({"prompts": (1, 1)})
    builder = builders.find("tensorrt-rtx")
    found = builders.compile_graph(builder, model, spec, sizes, ("sm89",)).arithmetic
    assert (found.compute, found.stored) == ("float32", "float32")
    assert "bfloat16" not in found.weights


def store_in_bfloat16(graph: ir.Graph, value: ir.Value) -> None:
    wide = ir.node(
        "Cast", [ir.Value(name=f"{value.name}.bf16")], {"to": mixed_precision.FLOAT.value}
    )
    stored, cast = wide.inputs[0], wide.outputs[0]
    assert stored is not None
    assert value.const_value is not None
    stored.dtype, stored.shape = ir.DataType.BFLOAT16, value.shape
    rounded = value.const_value.numpy().astype(ir.DataType.BFLOAT16.numpy())
    stored.const_value = ir.Tensor(rounded, dtype=ir.DataType.BFLOAT16)
    cast.dtype, cast.shape, cast.name = mixed_precision.FLOAT, value.shape, f"{value.name}.wide"
    value.replace_all_uses_with(cast)
    del graph.initializers[str(value.name)]
    graph.register_initializer(stored)
    graph.insert_before(graph[0], wide)


def run(model: ir.Model, path: Path, given: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    ir.save(model, path, external_data=f"{path.stem}.data")
    found: list[NDArray[Any]] = ort.InferenceSession(path).run(None, given)
    return found


def test_the_simulation_errs_as_float16_kernels_do(alpha_set: Path, tmp_path: Path) -> None:
    """onnxruntime has float16 for these operators, by kernels or by casts around them. One rounding
    that falls the other way moves all behind it, so sizes of errors are compared."""
    ids = load_case("case_04").tensors["flux.t5_input_ids"].astype(np.int64)
    real = converted(alpha_set, "t5_text", "float16")
    simulated = converted(alpha_set, "t5_text", "float16")
    simulate.simulate(simulated)
    exact = graphs.read(alpha_set / "t5_text.onnx", "t5_text")
    wanted, found, plain = (
        run(model, tmp_path / f"{i}.onnx", {"input_ids": ids})[0]
        for i, model in enumerate((real, simulated, exact))
    )
    errors = [float(np.sqrt(np.mean((it - plain) ** 2))) for it in (wanted, found)]
    assert errors[1] == pytest.approx(errors[0], rel=0.5)
    assert errors[0] > 1e-5


def gated(scale: float) -> ir.Model:
    """x -> (x @ up * scale) * (x @ gate * scale) @ down, as SwiGLU without its sigmoid."""
    text = """
        <ir_version: 10, opset_import: ["" : 23]>
        gated (float[1, 8] x) => (float[1, 8] y) {
            a = MatMul(x, up)
            b = MatMul(x, gate)
            p = Mul(a, b)
            y = MatMul(p, down)
        }
    """
    model = ir.from_onnx_text(text)
    numbers = np.random.default_rng(0)
    for name in ("up", "gate", "down"):
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        matrix = numbers.normal(size=(8, 8)).astype(np.float32) * (1 if name == "down" else scale)
        value.const_value = ir.Tensor(matrix)
        value.dtype, value.shape = mixed_precision.FLOAT, ir.Shape((8, 8))
        model.graph.register_initializer(value)
    for node in model.graph:
        node.outputs[0].dtype, node.outputs[0].shape = mixed_precision.FLOAT, ir.Shape((1, 8))
    return model


def test_gated_products_may_go_beyond_float16(tmp_path: Path) -> None:
    x = np.full((1, 8), 2.0, np.float32)
    exact = run(gated(60.0), tmp_path / "exact.onnx", {"x": x})[0]
    assert np.abs(exact).max() > np.finfo(np.float16).max
    model = gated(60.0)
    mixed_precision.convert(model, DEFINITIONS["mllm_text"], "float16")
    simulate.simulate(model)
    found = run(model, tmp_path / "half.onnx", {"x": x})[0]
    assert np.isfinite(found).all()
    assert np.abs(found - exact).max() < 0.01 * np.abs(exact).max()


def test_a_weight_beyond_float16_is_refused_by_name() -> None:
    model = gated(1e6)
    mixed_precision.convert(model, DEFINITIONS["mllm_text"], "float16")
    where = r"engine `mllm_text`: (up|gate) reaches .*e\+06, beyond the range"
    with pytest.raises(CompileError, match=where) as told:
        graphs.feed(None, model)  # no parser is reached
    assert "--compute bf16" in str(told.value.hint)
