"""Forms of a graph that a builder makes better kernels of: the same numbers, and what is left."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from bifrost_rt import manifest
from bifrost_rt.dims import of_run, shape_at
from export.compile import bound, graphs, joined, rotary
from export.compile.rewriting import rewrite
from export.stages.catalog import DEFINITIONS


def counts(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def run(model: ir.Model, path: Path, given: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    ir.save(model, path, external_data=f"{path.stem}.data")
    found: list[NDArray[Any]] = ort.InferenceSession(path).run(None, given)
    return found


@pytest.fixture(scope="module")
def given(alpha_set: Path) -> dict[str, NDArray[Any]]:
    """Random inputs of `denoise`, two images."""
    sizes, draw = of_run(text_tokens=9, steps=4, images=2), np.random.default_rng(0)
    made: dict[str, NDArray[Any]] = {}
    for tensor in manifest.read(alpha_set).engine("denoise").inputs:
        shape = shape_at(tensor.shape, sizes)
        values = draw.normal(size=shape) if tensor.dtype == "float32" else np.ones(shape)
        made[tensor.name] = values.astype(tensor.dtype)
    return made


@pytest.mark.parametrize("change", [rotary.rewrite, joined.rewrite])
def test_the_numbers_stay_those_of_the_graph(
    alpha_set: Path, tmp_path: Path, given: dict[str, NDArray[Any]], change: Any
) -> None:
    before = graphs.read(alpha_set / "denoise.onnx", "denoise")
    after = graphs.read(alpha_set / "denoise.onnx", "denoise")
    change(after)
    assert counts(after) != counts(before)
    expected = run(before, tmp_path / "before.onnx", given)
    for left, right in zip(run(after, tmp_path / "after.onnx", given), expected, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=2e-5)
        assert left.shape == right.shape


def test_every_norm_of_queries_and_keys_is_divided_by_last(alpha_set: Path) -> None:
    model = graphs.read(alpha_set / "denoise.onnx", "denoise")
    attentions = counts(model)["Attention"]
    norms = counts(model)["RMSNormalization"]
    # two in an attention over one kind of tokens, four in one over text and image
    assert 2 * attentions < norms <= 4 * attentions
    rotary.rewrite(model)
    after = counts(model)
    assert after["RMSNormalization"] == 0
    assert after["ReduceSumSquare"] == norms
    assert "Neg" not in after


def test_the_tables_of_rotations_are_held_once(alpha_set: Path) -> None:
    """Two networks, rows of text, of image and of both, two factors each."""
    model = graphs.read(alpha_set / "denoise.onnx", "denoise")
    rotary.rewrite(model)
    tables = [v for v in model.graph.initializers.values() if v.shape and len(v.shape) == 5]
    assert 2 * 2 <= len(tables) <= 2 * 3 * 2


def test_a_norm_that_no_rotation_follows_is_left_alone(alpha_set: Path) -> None:
    model = graphs.read(alpha_set / "mllm_text.onnx", "mllm_text")
    before = counts(model)
    assert before["RMSNormalization"] > 0
    rotary.rewrite(model)
    joined.rewrite(model)
    assert counts(model) == before


def test_a_product_of_joined_values_is_a_sum_of_two(alpha_set: Path) -> None:
    model = graphs.read(alpha_set / "denoise.onnx", "denoise")
    before, weights = counts(model), graphs.weight_bytes(model)
    joined.rewrite(model)
    after = counts(model)
    split = before["Concat"] - after["Concat"]
    assert split > 0
    assert after["MatMul"] - before["MatMul"] == split
    assert graphs.weight_bytes(model) == weights  # in parts, none of them twice


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_no_weight_is_cast_at_a_step(
    alpha_set: Path, monkeypatch: pytest.MonkeyPatch, compute: str
) -> None:
    """Of a set in 16 bit, whatever computes in float32 gets its weights in float32."""
    monkeypatch.setattr(bound, "SMALLEST", 1)
    model = graphs.read(alpha_set / "denoise.onnx", "denoise")
    stored = ir.DataType.BFLOAT16
    kept: dict[str, NDArray[Any]] = {}
    for name, value in list(model.graph.initializers.items()):
        if value.dtype != ir.DataType.FLOAT or len(value.shape or ()) != 2:
            continue
        assert value.const_value is not None
        rounded = value.const_value.numpy().astype(stored.numpy())
        kept[name] = rounded.astype(np.float32)
        narrow = ir.Value(
            name=name,
            shape=value.shape,
            type=ir.TensorType(stored),
            const_value=ir.Tensor(rounded, dtype=stored, name=name),
        )
        wide = ir.node("Cast", [narrow], {"to": ir.DataType.FLOAT.value})
        wide.outputs[0].name, wide.outputs[0].shape = f"{name}.wide", value.shape
        wide.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        value.replace_all_uses_with(wide.outputs[0])
        del model.graph.initializers[name]
        model.graph.register_initializer(narrow)
        model.graph.insert_before(model.graph[0], wide)
    rewrite(model, DEFINITIONS["denoise"], compute)
    bindings = {str(tensor.name): tensor for tensor in bound.bind(model)}
    taken = {value for value in model.graph.inputs if value.name in bindings}
    cast = [n for n in model.graph if n.op_type == "Cast" and n.inputs[0] in taken]
    assert cast == []
    embedder = "transformer_x_embedder.weight"
    assert bindings[embedder].dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(bindings[embedder].numpy(), kept[embedder])
