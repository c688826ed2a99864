"""A stage's torch module -> an ONNX graph, checked against what the stage promised.

No weight is needed for it: the module is traced on the meta device, and the graph's initializers
are read from their sources when they are written, one by one. They carry the names that the
module's parameters have.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import onnx_fusions

from bifrost_rt.manifest import TensorSpec
from export import sources
from export.errors import ExportError
from export.initializers import Weight
from export.quantize import operators
from export.sources import Source
from export.stages import BRANCHES, IMAGES, PROMPTS, REVEALED, STEPS, TEXT_TOKENS, TEXTS, Stage

OPSET = 23  # the first with Attention and RMSNormalization, the last that all consumers load

# Sizes of the example inputs. All differ and none is 0 or 1, so that torch.export cannot mistake
# one symbol for another or for a constant.
EXAMPLE_SIZES = {
    **{IMAGES: 3, PROMPTS: 4, TEXTS: 5, BRANCHES: 2, TEXT_TOKENS: 7, STEPS: 6},
    REVEALED: 11,
}

# One line per torchvision operator that is not there; no stage has one.
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


def to_graph(stage: Stage, *, weights: bool = True) -> ir.Model:
    """Trace and optimise one stage.

    Args:
        weights: False for a graph that is wanted for its shape alone, of a module whose tensors
            have no source; it is not optimised.

    Raises:
        ExportError: torch cannot trace it, or the graph's door is not the stage's.
    """
    found = sources.named(stage.module) if weights else {}
    inputs = [_example(spec).to("meta") for spec in stage.inputs]
    dynamic = [
        {i: torch.export.Dim.DYNAMIC for i, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in stage.inputs
    ]
    try:
        with warnings.catch_warnings(), sources.on_meta(stage.module):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                stage.module,
                tuple(inputs),
                input_names=[spec.name for spec in stage.inputs],
                output_names=[spec.name for spec in stage.outputs],
                dynamic_shapes=_like_signature(stage, dynamic),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                optimize=False,  # folds constants, for which it must have them
                custom_translation_table=operators.TRANSLATIONS,
            )
    except Exception as error:  # torch.onnx wraps failures in many types
        raise ExportError(f"stage `{stage.name}`: torch could not trace it: {error}") from error
    assert program is not None
    model = program.model
    if weights:
        _name_weights(model, found)
        _optimise(model)
    operators.add_functions(model)
    operators.pack(model)
    _name_symbols(model, stage)
    _strip_metadata(model)
    _check_door(model, stage)
    return model


def _name_weights(model: ir.Model, found: Mapping[str, Source]) -> None:
    """Give every initializer its source."""
    for name, value in model.graph.initializers.items():
        if name in found:
            assert value.dtype is not None
            value.const_value = Weight(found[name], value.dtype, name)


def _optimise(model: ir.Model) -> None:
    """What torch.onnx does with `optimize=True`, except that no large weight is read for it, and
    none loses its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # T5's buckets take the logarithm of 0, and do not use it
        optimize_ir(model, should_fold=_should_fold)
        onnx_fusions.fuse(model)
    _merge_constants(model.graph)
    _transpose_weights(model.graph)


def _should_fold(node: ir.Node) -> bool | None:
    """None leaves it to the optimiser, which computes with small values alone."""
    first = node.inputs[0] if node.inputs else None
    widened = node.op_type == "Cast" and first is not None and isinstance(first.const_value, Weight)
    return False if widened or _transposed_weight(node) is not None else None


def _merge_constants(graph: ir.Graph) -> None:
    """What the optimiser has computed, once each: FLUX's rotary tables become four constants in
    every block."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, Weight):
            continue
        same = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
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
        name = value.name if alone else f"{value.name}.transposed"
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


def save(model: ir.Model, path: Path) -> list[Path]:
    """Write `path` and, for the weights, `path` with the suffix `.data`; run ONNX's checker.

    Returns:
        The files written.

    Raises:
        ExportError: the checker refuses the graph.
    """
    data = path.with_suffix(".data")
    ir.save(model, path, external_data=data.name)
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"{path.name}: ONNX's checker refuses it: {error}") from error
    return [path, data] if data.exists() else [path]


def _example(spec: TensorSpec) -> torch.Tensor:
    shape = [EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in spec.shape]
    if spec.dtype == "float32":
        return torch.randn(shape)
    # zero is a valid token, index, step and length alike
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _like_signature(stage: Stage, dynamic: list[dict[int, object]]) -> object:
    """`dynamic_shapes` has the structure of the call: a variadic tail is one tuple."""
    parameters = inspect.signature(stage.module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        fixed = len(parameters) - 1
        return (*dynamic[:fixed], tuple(dynamic[fixed:]))
    return tuple(dynamic)


def _name_symbols(model: ir.Model, stage: Stage) -> None:
    """Give the symbols that torch made up the names that the stage uses."""
    names: dict[str, str] = {}
    for value, spec in zip(model.graph.inputs, stage.inputs, strict=False):
        for found, wanted in zip(value.shape or (), spec.shape, strict=False):
            if isinstance(wanted, str) and isinstance(found, ir.SymbolicDim):
                names.setdefault(str(found.value), wanted)
    for value in [*model.graph.inputs, *model.graph.outputs, *_inner_values(model)]:
        if value.shape is not None:
            value.shape = ir.Shape(
                [
                    _renamed(str(d.value), names)
                    if isinstance(d, ir.SymbolicDim) and d.value is not None
                    else d
                    for d in value.shape
                ]
            )


def _renamed(expression: str, names: dict[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), expression)


def _inner_values(model: ir.Model) -> list[ir.Value]:
    return [value for node in model.graph.all_nodes() for value in node.outputs]


def _strip_metadata(model: ir.Model) -> None:
    """Drop stack traces and names of the tracing: they hold paths of the machine that built it."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version, model.doc_string = "bifrost-rt", "", None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.initializers.values(), *_inner_values(model)]:
        value.metadata_props.clear()


def _check_door(model: ir.Model, stage: Stage) -> None:
    for kind, values, specs in (
        ("input", model.graph.inputs, stage.inputs),
        ("output", model.graph.outputs, stage.outputs),
    ):
        if len(values) != len(specs):
            raise ExportError(
                f"stage `{stage.name}`: expected {len(specs)} {kind}s, the graph has {len(values)}"
            )
        for value, spec in zip(values, specs, strict=True):
            shape = tuple(
                str(d.value) if isinstance(d, ir.SymbolicDim) else int(d) for d in value.shape or ()
            )
            dtype = value.dtype.numpy().name if value.dtype is not None else "unknown"
            found = TensorSpec(str(value.name), dtype, shape)
            if found != spec:
                raise ExportError(
                    f"stage `{stage.name}`: {kind} promised {spec.name} {spec}, "
                    f"the graph has {found.name} {found}"
                )
