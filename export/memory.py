"""Memory of a graph's arithmetic, counted from its nodes: what must be alive between its inputs and
outputs.

For an executor that frees a tensor after its last reader: views count as copies, and attention
holds its scores and their softmax, as onnxruntime's kernel does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from bifrost_rt import dims
from bifrost_rt.image_processor import Limits
from bifrost_rt.memory_plan import COUNTED_STEPS
from export.flops import shape_of

SCORES = 2 * 4  # bytes: scores and softmax, in float32
# What an arena loses to fragmentation: onnxruntime's took 416 MB for the 298 MB that a
# denoising step needs without one (benchmarks/results/residency.md).
ARENA = 1.5


def one_image(text_tokens: int) -> dict[str, int]:
    """Return the sizes for which a manifest states scratch memory: the longest prompt, the default
    steps, no guidance; one window of an image to look at."""
    return dims.of_run(text_tokens=text_tokens, steps=COUNTED_STEPS)


def square_bytes(model: ir.Model, largest: Limits) -> int:
    """Return what the scratch memory of looking takes beside what one window takes, for the square
    of the windows: every patch attends to all of them."""
    n = largest.windows
    if n == 1:
        return 0
    one = scratch_bytes(model, dims.of_run(text_tokens=1, steps=1))
    sizes = dims.of_run(text_tokens=1, steps=1, windows=n, vision_tokens=largest.tokens)
    return max(0, scratch_bytes(model, sizes) - n * one) // (n * n - n)


def one_piece() -> dict[str, int]:
    """Return the sizes for which a manifest states the scratch memory of reading a conversation: a
    piece of the prompt, behind a long cache."""
    return dims.of_run(text_tokens=dims.CHUNK, steps=1, **dims.ANSWERS)


def scratch_bytes(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """Memory for what is alive at once between a graph's inputs and outputs, in a backend's arena.
    The tensors of inputs and outputs are the caller's.

    Args:
        sizes: a number for every symbol of the graph's inputs.

    Raises:
        ValueError: a shape that the graph does not state.
    """
    graph = model.graph
    doors = {*graph.inputs, *graph.outputs}
    last_use: dict[ir.Value, int] = {}
    for i, node in enumerate(graph):
        last_use |= {value: i for value in node.inputs if value is not None}
    leaving: dict[int, list[ir.Value]] = {}
    for value, i in last_use.items():
        leaving.setdefault(i, []).append(value)
    alive: dict[ir.Value, int] = {}
    now = peak = 0
    for i, node in enumerate(graph):
        for value in node.outputs:
            if value not in doors and value in last_use and not _constant(node):
                alive[value] = _bytes(value, sizes)
                now += alive[value]
        peak = max(peak, now + _scores(node, sizes))
        for value in leaving.get(i, ()):
            now -= alive.pop(value, 0)
    return math.ceil(ARENA * peak)


def _constant(node: ir.Node) -> bool:
    """Say whether a value is computed from weights alone, so once, when the engine is opened: a
    weight in memory."""
    return node.op_type in ("Cast", "Transpose") and all(
        value is not None and value.is_initializer() for value in node.inputs
    )


def _bytes(value: ir.Value, sizes: Mapping[str, int]) -> int:
    dtype = value.dtype
    if dtype is None:
        raise ValueError(f"the graph does not state the type of {value.name}")
    if _anonymous(value):
        # Lists of row numbers, and the ones that a mask is joined with, have lengths that the
        # exporter does not name; a reader of the same rank has their shape.
        readers = (out for use in value.uses() for out in use.node.outputs)
        value = next((v for v in readers if _rank(v) == _rank(value) and not _anonymous(v)), value)
        if _anonymous(value):
            return 0
    return math.ceil(math.prod(shape_of(value, sizes)) * dtype.itemsize)


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _anonymous(value: ir.Value) -> bool:
    return any(isinstance(d, ir.SymbolicDim) and d.value is None for d in value.shape or ())


def _scores(node: ir.Node, sizes: Mapping[str, int]) -> int:
    if node.op_type != "Attention":
        return 0
    batch, heads, queries, _ = shape_of(node.inputs[0], sizes)
    return SCORES * batch * heads * queries * shape_of(node.inputs[1], sizes)[2]
