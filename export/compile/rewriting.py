"""What a graph of a set goes through before a builder of TensorRT reads it."""

from __future__ import annotations

import onnx_ir as ir

from export.compile import cache_rows, joined, mixed_precision, quantized, rotary
from export.stages import Definition


def rewrite(graph: ir.Model, engine: Definition, compute: str) -> None:
    """In place: quantized layers and writing into caches as TensorRT knows them, what it makes
    better kernels of in another form, and all other arithmetic in `compute`, a type as
    `compute_type` gives it."""
    quantized.rewrite(graph)
    cache_rows.rewrite(graph)
    rotary.rewrite(graph)
    joined.rewrite(graph)
    if compute != "float32":
        mixed_precision.convert(graph, engine, compute)
