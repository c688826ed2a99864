"""A stage's torch module -> an ONNX graph, checked against what the stage promised."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import DeduplicateInitializersPass

from bifrost_rt.manifest import TensorSpec
from export.errors import ExportError
from export.stages import BRANCHES, IMAGES, PROMPTS, STEPS, TEXT_TOKENS, TEXTS, Stage

TABLE = 1 << 20  # elements; what is larger is a weight matrix, and no two of those are equal
OPSET = 23  # the first with Attention and RMSNormalization, the last that all consumers load

# Sizes of the example inputs. All differ and none is 0 or 1, so that torch.export cannot mistake
# one symbol for another or for a constant.
EXAMPLE_SIZES = {IMAGES: 3, PROMPTS: 4, TEXTS: 5, BRANCHES: 2, TEXT_TOKENS: 7, STEPS: 6}


# One line per torchvision operator that is not there; no stage has one.
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


def to_graph(stage: Stage, *, weights: bool = True) -> ir.Model:
    """Trace and optimise one stage.

    Args:
        weights: False for a module on the meta device, whose graph is wanted for its shape alone.

    Raises:
        ExportError: torch cannot trace it, or the graph's door is not the stage's.
    """
    device = "cpu" if weights else "meta"
    inputs = [_example(spec).to(device) for spec in stage.inputs]
    dynamic = [
        {i: torch.export.Dim.DYNAMIC for i, d in enumerate(spec.shape) if isinstance(d, str)}
        for spec in stage.inputs
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                stage.module if weights else stage.module.to(device),
                tuple(inputs),
                input_names=[spec.name for spec in stage.inputs],
                output_names=[spec.name for spec in stage.outputs],
                dynamic_shapes=_like_signature(stage, dynamic),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                optimize=weights,  # folds constants, for which it must have them
            )
    except Exception as error:  # torch.onnx wraps failures in many types
        raise ExportError(f"stage `{stage.name}`: torch could not trace it: {error}") from error
    assert program is not None
    model = program.model
    if weights:
        # FLUX's rotary tables become four constants in every block: 180 MB at its real size
        DeduplicateInitializersPass(size_limit=TABLE)(model)
    _name_symbols(model, stage)
    _strip_metadata(model)
    _check_door(model, stage)
    return model


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
