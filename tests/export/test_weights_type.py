"""What an engine's weights are in is what its layers hold, not the type of a table beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from bifrost_rt import manifest
from export import assemble, graph, precision
from export.checkpoint import Checkpoint
from export.compile.compiled_set import compile_set
from export.compile.network import Arithmetic
from export.errors import CompileError
from tests.conftest import ALPHA
from tests.export.conftest import holding, rewritten


def model_of(**tensors: np.ndarray) -> ir.Model:
    values = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in tensors.items()
    ]
    return ir.Model(ir.Graph([], [], nodes=[], initializers=values), ir_version=10)


def test_tables_of_whole_numbers_come_last_however_large() -> None:
    model = model_of(
        positions=np.zeros(900, np.int64),
        mask=np.zeros(700, bool),
        weight=np.zeros(100, np.float16),
        bias=np.zeros(10, np.float32),
    )
    found = precision.weight_bytes(model)
    assert list(found) == ["float16", "float32", "int64", "bool"]
    assert found["int64"] == 7200
    assert Arithmetic({}, found).stored == "float16"


def test_quantized_weights_are_no_table() -> None:
    model = model_of(weight=np.zeros(900, np.int8), bias=np.zeros(10, np.float32))
    assert next(iter(precision.weight_bytes(model))) == "int8"


def test_a_small_t5_with_512_positions_is_held_in_16_bit() -> None:
    """Its table of 512 x 512 positions in int64 is larger than all of its weights."""
    checkpoint = Checkpoint(*(ALPHA / part for part in ("mllm", "bifrost", "flux")), read=False)
    stages = assemble.stages(checkpoint, assemble.facts(checkpoint), 48, 77, 512)
    [t5] = [stage for stage in stages if stage.name == "t5_text"]
    precision.round_weights(t5.module, "fp16")
    traced = graph.to_graph(t5)
    precision.store(traced, "fp16")
    found = precision.weight_bytes(traced)
    assert found["int64"] > found["float16"]
    assert next(iter(found)) == "float16"


def test_a_set_that_names_the_type_of_its_tables_compiles(small_set: Path, tmp_path: Path) -> None:
    """As versions before this one wrote it."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    source = Path(shutil.copytree(small_set, tmp_path / "source"))
    rewritten(source, lambda m: holding(m, requested="fp16", weights="int64"))
    output = compile_set(source, tmp_path / "out", targets=("sm89",), max_images=1)
    for spec in manifest.read(output).engines:
        assert (spec.precision.weights, spec.precision.compute) == ("float16", "float16")
    report = json.loads((output / "report.json").read_text())["compiled"]["engines"]
    assert report["t5_text"]["products"].keys() == {"float16"}
    # what layers do compute in still counts
    rewritten(source, lambda m: holding(m, weights="float8_e4m3fn"))
    with pytest.raises(CompileError, match=r"sm86 .* has no fp8 arithmetic"):
        compile_set(source, tmp_path / "older", targets=("sm86",), max_images=1)
