"""A stage's torch module -> an ONNX graph, checked against what the stage promised.

Its trace knows no weight. Here the initializers get their sources, from which they are read when
they are written, one by one, and quantized layers get their operators. Initializers carry the names
that the module's tensors have.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch import nn

from export import lazy_tensors
from export.errors import ExportError
from export.initializers import TRANSPOSED, Place, Weight
from export.quantize import operators
from export.quantize.linear import QuantizedLinear
from export.stages import Stage
from export.trace import trace


def to_graph(stage: Stage) -> ir.Model:
    """Return the graph of one stage, whose weights have sources.

    Raises:
        ExportError: torch cannot trace it, or the graph's inputs and outputs are not the stage's.
    """
    layers = {
        path: layer
        for path, layer in stage.module.named_modules(remove_duplicate=False)
        if isinstance(layer, QuantizedLinear)
    }
    found = lazy_tensors.named(stage.module)
    with _as_linear(stage.module, layers):
        model = trace(stage)
    operators.quantize(model, layers)
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            value.const_value = Weight(found[name], value.dtype, name)
    _share_weights(model.graph)
    _transpose_weights(model.graph)
    return model


INLINE = 256  # bytes; so many stay in the graph


@contextlib.contextmanager
def _as_linear(module: nn.Module, layers: dict[str, QuantizedLinear]) -> Iterator[None]:
    """For as long as the context lasts, linear layers without values stand for quantized ones: a
    model has one trace, whatever its precision."""
    plain = {layer: layer.as_linear() for layer in layers.values()}
    for path, layer in layers.items():
        module.set_submodule(path, plain[layer])
    try:
        yield
    finally:
        for path, layer in layers.items():
            module.set_submodule(path, layer)


def _share_weights(graph: ir.Graph) -> None:
    """Store once what is one tensor of the checkpoint, as where a head is tied to the embedding and
    both were rounded."""
    first: dict[tuple[str, ir.DataType], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        if not isinstance(value.const_value, Weight):
            continue
        same = first.setdefault((value.const_value.source.identity, value.const_value.dtype), value)
        if same is not value:
            value.replace_all_uses_with(same)
            del graph.initializers[name]


def _transposed_weight(node: ir.Node) -> ir.Value | None:
    value = node.inputs[0] if node.op_type == "Transpose" else None
    return value if value is not None and isinstance(value.const_value, Weight) else None


def _transpose_weights(graph: ir.Graph) -> None:
    """torch keeps the weight of a linear layer as [N, K] and ONNX multiplies by [K, N]: it is
    stored that way."""
    for node in list(graph):
        value = _transposed_weight(node)
        if value is None:
            continue
        weight, order = value.const_value, node.attributes.get_ints("perm")
        assert isinstance(weight, Weight)
        assert value.name is not None
        alone = len(value.uses()) == 1
        name = value.name if alone else f"{value.name}{TRANSPOSED}"
        source = weight.source.map(
            f"permuted {order}",
            functools.partial(torch.permute, dims=order),
            shape=[weight.source.shape[i] for i in order],
        )
        stored = ir.Value(
            name=name,
            shape=ir.Shape(source.shape),
            type=ir.TensorType(weight.dtype),
            const_value=Weight(source, weight.dtype, name),
        )
        node.outputs[0].replace_all_uses_with(stored)
        graph.remove(node, safe=True)
        if alone:
            del graph.initializers[value.name]
        graph.register_initializer(stored)


def save(
    model: ir.Model, path: Path, elsewhere: Mapping[str, Place] | None = None
) -> tuple[list[Path], dict[str, Place]]:
    """Write `path` and, for the weights, `path` with the suffix `.data`; run ONNX's checker.

    Args:
        elsewhere: initializers that files beside it hold already.

    Returns:
        The files written, and the places of the initializers that are in files.

    Raises:
        ExportError: the checker refuses the graph.
    """
    data = path.with_suffix(".data")
    graph, elsewhere = model.graph, elsewhere or {}
    kept = {name: graph.initializers[name].const_value for name in elsewhere}
    for name in elsewhere:
        graph.initializers[name].const_value = None  # nothing to write
    ir.external_data.unload_from_model(model, path.parent, data.name, size_threshold_bytes=INLINE)
    for name, place in elsewhere.items():
        tensor = kept[name]
        assert tensor is not None
        graph.initializers[name].const_value = ir.ExternalTensor(
            *(place.file, place.offset, place.length, tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
            base_dir=path.parent,
        )
    ir.save(model, path)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name}: ONNX's checker refuses it: {error}") from error
    places = {
        name: Place(str(tensor.location), tensor.offset or 0, tensor.length or tensor.nbytes)
        for name, value in graph.initializers.items()
        if isinstance(tensor := value.const_value, ir.ExternalTensor)
    }
    return [path, data] if data.exists() else [path], places
