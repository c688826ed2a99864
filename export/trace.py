"""A stage's torch module -> the graph of what it computes, without the values of its weights.

A trace depends on the architecture, the sizes, the code and the library versions alone, so it is
kept in the cache folder: another precision of the same model, and a rebuild, need none. Weights
are unknown here to whatever optimizes a graph; only tables that the architecture decides, such as
rotary positions, are computed with.
"""

from __future__ import annotations

import inspect
import logging
import re
import warnings

import onnx
import onnx_ir as ir
import torch
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter import onnx_fusions

from bifrost_rt import cache, dims
from bifrost_rt.manifest import TensorSpec
from export import fingerprint, lazy_tensors
from export.errors import ExportError
from export.initializers import Weight
from export.model.cache import PLACEHOLDER, PLACEHOLDER_OPSET
from export.stages import Stage

OPSET = 23  # the first with Attention and RMSNormalization, the last that all consumers load
KIND = "traces"  # subfolder of the cache

EXAMPLE_SIZES = {name: dim.example for name, dim in dims.DIMS.items()}

log = logging.getLogger("export")
# One line per torchvision operator that is not there; no stage has one.
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
# One line per initializer that has no value: all weights, on purpose.
logging.getLogger("onnx_ir.passes.common.initializer_deduplication").setLevel(logging.ERROR)


def trace(stage: Stage) -> ir.Model:
    """Return the graph of a stage.

    Initializers that a checkpoint fills have no value; they have the names and shapes of the
    module's tensors.

    Raises:
        ExportError: torch cannot trace it, or the graph's inputs and outputs are not the stage's.
    """
    key = fingerprint.of(stage, EXAMPLE_SIZES, OPSET)
    stored = None if key is None else cache.read(KIND, key)
    if stored is None:
        stored = _to_bytes(_trace(stage))
        if key is not None and (reason := cache.write(KIND, key, stored)):
            log.warning("the trace of `%s` is not kept: %s", stage.name, reason)
    return _from_bytes(stored)


def _trace(stage: Stage) -> ir.Model:
    tables = {
        name: lazy_tensors.held(table)
        for name, table in stage.module.named_buffers(remove_duplicate=False)
        if not table.is_meta
    }
    inputs = [example(spec).to("meta") for spec in stage.inputs]
    dynamic = [
        {i: torch.export.Dim.DYNAMIC for i, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in stage.inputs
    ]
    try:
        with warnings.catch_warnings(), lazy_tensors.on_meta(stage.module):
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
                optimize=False,  # done below, with what may be computed with
            )
    except Exception as error:  # torch.onnx wraps failures in many types
        raise ExportError(f"engine `{stage.name}`: torch could not trace it: {error}") from error
    assert program is not None
    model = program.model
    module = stage.module
    filled = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    filled |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for name, value in model.graph.initializers.items():
        if name in tables:
            assert value.dtype is not None
            value.const_value = Weight(tables[name], value.dtype, name)
        elif name in filled:
            value.const_value = None
    _place_operators(model)
    _optimize(model)
    _name_symbols(model, stage)
    _strip_metadata(model)
    _check_signature(model, stage)
    return model


def _place_operators(model: ir.Model) -> None:
    """Put the operators that torch does not know where they belong: into ONNX's own, of the opset
    that they came with."""
    placeholders = [node for node in model.graph.all_nodes() if node.domain == PLACEHOLDER]
    for node in placeholders:
        node.domain, node.version = "", None
    model.opset_imports.pop(PLACEHOLDER, None)
    if placeholders:
        model.opset_imports[""] = PLACEHOLDER_OPSET


def _to_bytes(model: ir.Model) -> bytes:
    """Return a model as a file has it; values that are not there are said to lie elsewhere."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            assert value.dtype is not None
            assert value.shape is not None
            value.const_value = ir.ExternalTensor(
                "checkpoint", 0, 0, value.dtype, shape=value.shape, name=name
            )
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def _from_bytes(stored: bytes) -> ir.Model:
    model = ir.serde.deserialize_model(onnx.ModelProto.FromString(stored))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model


def _optimize(model: ir.Model) -> None:
    """Do what torch.onnx does with `optimize=True`; no weight is known to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # T5's buckets take the logarithm of 0, and do not use it
        optimize_ir(model)
        onnx_fusions.fuse(model)
    _merge_constants(model.graph)


def _merge_constants(graph: ir.Graph) -> None:
    """Return what the optimizer has computed, once each: FLUX's rotary tables become four constants
    in every block."""
    first: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        same = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if same is not value:
            value.replace_all_uses_with(same)
            del graph.initializers[name]


def example(spec: TensorSpec) -> torch.Tensor:
    """Values for an input of a stage, at the sizes of `EXAMPLE_SIZES`."""
    shape = dims.shape_at(spec.shape, EXAMPLE_SIZES)
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


def _check_signature(model: ir.Model, stage: Stage) -> None:
    for kind, values, specs in (
        ("input", model.graph.inputs, stage.inputs),
        ("output", model.graph.outputs, stage.outputs),
    ):
        if len(values) != len(specs):
            raise ExportError(
                f"engine `{stage.name}`: expected {len(specs)} {kind}s, the graph has {len(values)}"
            )
        for value, spec in zip(values, specs, strict=True):
            shape = tuple(
                str(d.value) if isinstance(d, ir.SymbolicDim) else int(d) for d in value.shape or ()
            )
            dtype = value.dtype.numpy().name if value.dtype is not None else "unknown"
            found = TensorSpec(str(value.name), dtype, shape)
            if found != spec:
                raise ExportError(
                    f"engine `{stage.name}`: {kind} promised {spec.name} {spec}, "
                    f"the graph has {found.name} {found}"
                )
