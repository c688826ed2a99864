"""One ONNX graph -> one engine, with the builder API of TensorRT-RTX or TensorRT."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from bifrost_rt.backends.tensorrt import too_old
from bifrost_rt.backends.tensorrt_log import logger
from bifrost_rt.manifest import EngineSpec
from export.compile import graphs, messages, network
from export.compile.network import Arithmetic
from export.compile.options import TITLES
from export.compile.profiles import Sizes, symbolic_inputs
from export.errors import CompileError


@dataclass(frozen=True)
class Builder:
    """A library that compiles, opened. `version` is what its engines are tied to."""

    name: str
    title: str
    module: str
    version: str

    @property
    def library(self) -> Any:
        """The Python module."""
        return importlib.import_module(self.module)

    @property
    def ahead_of_time(self) -> bool:
        """Whether it compiles for GPUs that are not there; TensorRT measures on its own."""
        return hasattr(self.library.IBuilderConfig, "set_compute_capability")


def find(name: str) -> Builder:
    """Return the builder called `name`.

    Raises:
        CompileError: its package is not installed or too old, or a library of it is missing.
    """
    module = name.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        raise CompileError(
            f"{TITLES[name]} is not installed (the Python package `{module}`)",
            hint=f"pip install 'bifrost-rt[{name}]'",
        )
    try:
        version = str(importlib.import_module(module).__version__)
    # a shared library that it needs is not there, or something else has its name
    except (ImportError, OSError, AttributeError) as error:
        raise CompileError(
            f"{TITLES[name]} is installed and cannot be loaded: {error}",
            hint=f"reinstall it: pip install --force-reinstall 'bifrost-rt[{name}]'",
        ) from error
    if reason := too_old(name, version):
        raise CompileError(reason[0], hint=reason[1])
    return Builder(name, TITLES[name], module, version)


@dataclass(frozen=True)
class Built:
    """One compiled engine: its bytes, as a buffer, the flags that it was built with, what its
    network computes in, and the builder's word on the GPU memory that it takes."""

    engine: Any
    flags: tuple[str, ...]
    arithmetic: Arithmetic
    activation_bytes: int
    weight_bytes: int


def compile_graph(
    builder: Builder,
    graph: ir.Model,
    spec: EngineSpec,
    sizes: Sizes,
    targets: Sequence[str],
    weights: Collection[str] = (),
    *,
    current: bool = False,
) -> Built:
    """Compile one graph of a set; `graph` is used up.

    Args:
        spec: the graph's doors.
        targets: architectures; one engine serves all of them.
        weights: inputs beside those of the doors, which are weights.
        current: compile for this machine's own GPU as the library finds it, not for an architecture
            of `targets`.

    Raises:
        CompileError: naming stage, layer and what to do.
    """
    log = logger(builder.module)
    log.take()
    log.take_memory()
    with messages.explained(spec.name, builder.title, log):
        return _compile(builder, log, graph, spec, sizes, () if current else targets, weights)


def _compile(
    builder: Builder,
    log: Any,
    graph: ir.Model,
    spec: EngineSpec,
    sizes: Sizes,
    targets: Sequence[str],
    weights: Collection[str],
) -> Built:
    trt = builder.library
    maker = trt.Builder(log)
    parsed = maker.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(parsed, log)
    held = graphs.feed(parser, graph)
    if held is None:
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise messages.parser_error(spec.name, builder.title, errors)
    _check_door(parsed, spec, weights)
    flags = ["strongly_typed"]
    if _mark_attention(trt, parsed):
        flags.append("decomposable_attention")
    config = maker.create_builder_config()
    # float32 means float32: TF32 keeps 10 bits of mantissa and is on unless it is cleared
    config.clear_flag(trt.BuilderFlag.TF32)
    flags.append("no_tf32")
    if builder.ahead_of_time:
        names = [target.upper() for target in targets] or ["CURRENT"]
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), i)
    if inputs := symbolic_inputs(spec):
        profile = maker.create_optimization_profile()
        for tensor in inputs:
            profile.set_shape(tensor.name, *sizes.of(tensor))
        config.add_optimization_profile(profile)
    engine = maker.build_serialized_network(parsed, config)
    if engine is None:
        raise messages.builder_error(spec.name, builder.title, log.take())
    return Built(engine, tuple(flags), network.read(trt, parsed, weights), *log.take_memory())


def _mark_attention(trt: Any, parsed: Any) -> int:
    """Let every attention layer be taken apart where no kernel fits: in float32 none does, and in
    16 bit it depends on the head's width. Returns how many there are."""
    marked = 0
    for i in range(parsed.num_layers):
        layer = parsed.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # the bindings' way to a derived type
            layer.attention.decomposable = True
            marked += 1
    return marked


def _check_door(parsed: Any, spec: EngineSpec, weights: Collection[str]) -> None:
    """Return the backend binds by the manifest's names, and device memory only."""
    inputs = [parsed.get_input(i) for i in range(parsed.num_inputs)]
    inputs = [tensor for tensor in inputs if tensor.name not in weights]
    outputs = [parsed.get_output(i) for i in range(parsed.num_outputs)]
    for kind, found, promised in (
        ("inputs", inputs, spec.inputs),
        ("outputs", outputs, spec.outputs),
    ):
        names, wanted = {t.name for t in found}, {t.name for t in promised}
        if names != wanted:
            raise CompileError(
                f"engine `{spec.name}`: the graph's {kind} are {sorted(names)}, "
                f"the manifest's {sorted(wanted)}",
                hint="rebuild the set with `python -m export.build`",
            )
    if on_host := [t.name for t in inputs if t.is_shape_tensor]:
        raise CompileError(
            f"engine `{spec.name}`: the sizes inside depend on the values of {', '.join(on_host)}, "
            "which would have to be read back from the GPU in every step",
            hint="please report this",
        )
