"""A head that is tied to the embedding: one tensor in the checkpoint, one in the engine's files."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from export import assemble, engine_files, memory, precision
from export.checkpoint import Checkpoint
from export.synthesize import synthesize
from export.synthetic.shapes import Shapes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_a_tied_head_is_stored_once(tmp_path: Path, asked: str, tied: bool) -> None:
    shapes = Shapes(tied_head=tied)
    synthesize(shapes, tmp_path / "checkpoint", seed=3)
    parts = (tmp_path / "checkpoint" / part for part in ("mllm", "bifrost", "flux"))
    checkpoint = Checkpoint(*parts, read=False)
    stage = next(assemble.stages(checkpoint, assemble.facts(checkpoint), 64, 77, 16))
    precision.round_weights(stage.module, asked)
    files, _ = engine_files.write(stage, tmp_path, asked, memory.one_image(64))
    graph = onnx.load(files[0], load_external_data=False).graph
    table = [shapes.decoder.vocab_size, shapes.decoder.hidden_size]
    tables = [initializer.name for initializer in graph.initializer if initializer.dims == table]
    assert len(tables) == (1 if tied else 2)
    looked_up = [node for node in graph.node if node.op_type == "Gather"]
    multiplied = [node for node in graph.node if node.op_type == "Gemm"]
    names = {tables[0], tables[-1]}
    behind = {cast.output[0]: cast.input[0] for cast in graph.node if cast.op_type == "Cast"}
    assert any(behind.get(node.input[0], node.input[0]) in names for node in looked_up)
    assert any(behind.get(node.input[1], node.input[1]) in names for node in multiplied)
