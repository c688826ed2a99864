"""No engine computes with the size of a tensor. Libraries keep sizes on the host: one that meets
values is copied to the GPU at every step, and onnxruntime records no CUDA graph of that."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from bifrost_rt import manifest

# Operands that are read on the host, or that say a shape.
HOST_OPERANDS = {
    "ConstantOfShape": {0},
    "Expand": {1},
    "Pad": {1},
    "Range": {0, 1, 2},
    "Reshape": {1},
    "Slice": {1, 2, 3, 4},
    "Split": {1},
    "Squeeze": {1},
    "Tile": {1},
    "Unsqueeze": {1},
}


def copied(graph: ir.Graph) -> list[str]:
    """The nodes in which a size meets a tensor."""
    sizes: set[ir.Value] = set()
    found = []
    for node in graph:
        mine = {i for i, value in enumerate(node.inputs) if value in sizes}
        if node.op_type in ("Shape", "Size"):
            sizes |= set(node.outputs)
        elif mine <= HOST_OPERANDS.get(node.op_type, set()):
            continue
        elif all(
            v is None or v in sizes or ir.convenience.get_const_tensor(v) for v in node.inputs
        ):
            sizes |= set(node.outputs)
        else:
            found.append(f"{node.op_type} {node.name}")
    return found


def test_engines_compute_with_no_size(alpha_set: Path) -> None:
    for spec in manifest.read(alpha_set).engines:
        assert copied(ir.load(alpha_set / spec.files[0]).graph) == [], spec.name


def test_a_size_in_the_arithmetic_is_found() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23]> scaled (int64[n, 4] x) => (int64[m, 4] y) {
            rows = Shape <start = 0, end = 1> (x)
            twice = Concat <axis = 0> (rows, rows)
            spread = Expand (x, twice)
            y = Mul (spread, rows)
        }"""
    )
    assert [found.split()[0] for found in copied(model.graph)] == ["Mul"]
