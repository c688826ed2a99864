"""16-bit weights.

onnxruntime's CPU provider has no 16-bit kernels for these graphs, so a 16-bit set for it stores
its weights in 16 bit and computes in float32; the manifest says both. Rounding happens between the
checkpoint and the torch module, so parity compares the engine with exactly what it holds; the graph
then stores without loss what fits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from bifrost_rt.manifest import INDICES
from export import lazy_tensors
from export.errors import ExportError
from export.formats import FORMATS, HALF, SIXTEEN_BIT
from export.initializers import Weight

PRECISIONS: dict[str, torch.dtype] = {
    declared.name: getattr(torch, declared.dtype)
    for declared in FORMATS.values()
    if not declared.quantized
}
# Norms, biases, tokens and positional embeddings stay in float32: they are less than a thousandth
# of the bytes and add to everything.
ROUNDED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)
_IR = {PRECISIONS[declared.name]: ir.DataType[declared.dtype.upper()] for declared in SIXTEEN_BIT}
SMALL = 4096  # bytes; not worth a node


def round_weights(
    module: nn.Module, precision: str, of_layers: Mapping[str, str] | None = None
) -> None:
    """Round the weights of the linear, convolution and embedding layers, when they are read.

    Args:
        of_layers: path of a layer -> its own precision.

    Raises:
        ExportError: then, of a weight that does not fit the range of fp16.
    """
    if not of_layers and PRECISIONS[precision] == torch.float32:
        return
    for name, layer in module.named_modules():
        if isinstance(layer, ROUNDED):
            wanted = (of_layers or {}).get(name, precision)
            rounded = functools.partial(_rounded, f"{name}.weight", wanted)
            dtype = PRECISIONS[wanted]
            source = lazy_tensors.of(layer, "weight").map(wanted, rounded, dtype=dtype)
            lazy_tensors.attach(layer, "weight", source)


def _rounded(name: str, precision: str, weight: Tensor) -> Tensor:
    rounded = weight.to(PRECISIONS[precision])
    if rounded is not weight and not torch.isfinite(rounded).all():
        raise ExportError(
            f"{name} reaches {weight.abs().max().item():.3g}, beyond the range of {precision}",
            hint=f"build with --precision {HALF.name}",
        )
    return rounded


def store(model: ir.Model, precision: str) -> None:
    """Store in 16 bit what is rounded to 16 bit, or was never more, with a Cast behind it."""
    dtype = PRECISIONS[precision]
    if dtype == torch.float32:
        return
    graph = model.graph
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.nbytes < SMALL:
            continue
        name = str(value.name)
        half = _half(tensor, dtype, name)
        if half is None:
            continue
        stored = ir.Value(
            name=name, shape=value.shape, type=ir.TensorType(half.dtype), const_value=half
        )
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT.value}, num_outputs=1)
        del graph.initializers[name]
        graph.register_initializer(stored)
        cast.outputs[0].name = f"{name}.float32"
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, value.type
        value.replace_all_uses_with(cast.outputs[0])
        graph.insert_before(graph[0], cast)


def _half(tensor: ir.TensorProtocol, dtype: torch.dtype, name: str) -> ir.TensorProtocol | None:
    """Return the tensor in 16 bit, where that loses nothing."""
    if isinstance(tensor, Weight):
        kind = _IR.get(tensor.source.dtype)
        return None if kind is None else Weight(tensor.source, kind, name)
    exact = torch.from_numpy(np.array(tensor.numpy()))  # what the optimiser has computed
    half = exact.to(dtype)
    return ir.tensor(half, name=name) if torch.equal(half.to(torch.float32), exact) else None


def weight_bytes(model: ir.Model) -> dict[str, int]:
    """Return bytes of the initializers by dtype, read from the graph that is saved: most bytes
    first, and behind all others what layers do not compute in. A small T5 has less weights than
    positions."""
    found: dict[str, int] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            dtype = value.const_value.dtype.numpy().name
            found[dtype] = found.get(dtype, 0) + value.const_value.nbytes
    order = sorted(found, key=lambda dtype: (dtype in INDICES, -found[dtype]))
    return {dtype: found[dtype] for dtype in order}
