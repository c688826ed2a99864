"""Run an engine whose weights do not fit in memory: its graph is cut into pieces, and onnxruntime
opens, runs and closes one after another, on the engine's own files.

For the build, which must compare and draw on the machine that it runs on. Every call reads the
weights anew, so an engine that fits is opened whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from bifrost_rt.backends.base import (
    Backend,
    Buffer,
    Engine,
    HostMemory,
    check_bindings,
    return_freed_memory,
)
from bifrost_rt.backends.onnxruntime import session_options
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import EngineSpec, Range
from export.errors import ExportError


@dataclass(frozen=True)
class Partition:
    """A graph of its own: some consecutive nodes, with the weights that they read.

    Attributes:
        takes, gives: names of the values that it reads from before and leaves for later.
    """

    model: bytes
    takes: tuple[str, ...]
    gives: tuple[str, ...]


class Bounded(HostMemory):
    """A backend of onnxruntime's files that opens in pieces what exceeds `limit` bytes.

    Attributes:
        pieces: per engine, in how many pieces it was opened last.
    """

    def __init__(self, backend: Backend, limit: int) -> None:
        self.name = backend.name
        self.partitions: dict[str, int] = {}
        self._backend, self._limit = backend, limit

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """Return the backend's, up to the limit."""
        return min(self._backend.weights_in_memory(spec, stored), self._limit)

    def open(self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]) -> Engine:
        """Return the backend's engine, or one in pieces."""
        stored = sum((folder / name).stat().st_size for name in spec.files) + sum(
            spec.shared.values()
        )
        if self._backend.weights_in_memory(spec, stored) <= self._limit:
            self.partitions[spec.name] = 1
            return self._backend.open(folder, spec, dimensions)
        engine = PartitionedEngine(folder, spec, dimensions, self._limit)
        self.partitions[spec.name] = len(engine.partitions)
        return engine


class PartitionedEngine:
    """One engine, never in memory as a whole."""

    def __init__(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range], limit: int
    ) -> None:
        self.spec = spec
        self._folder, self._dimensions = folder, dimensions
        model = onnx.load(str(folder / spec.graph), load_external_data=False)
        self.partitions = cut(model, limit)

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return a call on these arrays."""
        check_bindings(self.spec, self._dimensions, inputs, outputs)

        def call() -> None:
            values = {name: np.asarray(buffer) for name, buffer in inputs.items()}
            last = {name: i for i, piece in enumerate(self.partitions) for name in piece.takes}
            for i, piece in enumerate(self.partitions):
                values |= self._run(piece, values)
                for name in piece.takes:
                    if last[name] == i and name not in outputs:
                        del values[name]
            for name, buffer in outputs.items():
                np.copyto(np.asarray(buffer), values[name])

        return call

    def _run(self, piece: Partition, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        options, disabled = session_options(self.spec)
        options.enable_mem_pattern = False
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._folder)
        )
        try:
            session = ort.InferenceSession(
                piece.model,
                sess_options=options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=disabled,
            )
        except Exception as error:  # onnxruntime raises many unrelated types here
            raise BackendError(
                f"{self._folder / self.spec.graph}: onnxruntime cannot load a piece of this "
                f"engine: {error}"
            ) from error
        found = session.run(list(piece.gives), {name: values[name] for name in piece.takes})
        del session
        return_freed_memory()
        return dict(zip(piece.gives, found, strict=True))

    def close(self) -> None:
        """Nothing is open between two calls."""


def cut(model: ModelProto, limit: int) -> tuple[Partition, ...]:
    """Cut a graph into pieces of consecutive nodes whose weights take at most `limit` bytes when
    they are opened, or as few as one node has.

    What is computed from weights alone, such as the float32 values of 16-bit ones, is computed in
    each piece that reads it.

    Raises:
        ExportError: a graph with other graphs inside, or one that does not state its types.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    fixed: set[str] = set(weights)
    work: list[NodeProto] = []
    for node in graph.node:
        if any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            raise ExportError(f"{graph.name}: {node.op_type} holds a graph and cannot be cut")
        if node.input and all(name in fixed or not name for name in node.input):
            fixed |= set(node.output)
        else:
            work.append(node)

    def closure(node: NodeProto) -> dict[str, TensorProto | NodeProto]:
        """Return the weights of a node and the nodes that unpack them, by the names of what they
        give."""
        found: dict[str, TensorProto | NodeProto] = {}
        for name in node.input:
            if name in weights:
                found[name] = weights[name]
            elif name in fixed:
                found |= closure(makers[name])
                found[name] = makers[name]
        return found

    sizes = _sizes(graph)
    groups: list[tuple[list[NodeProto], dict[str, TensorProto | NodeProto]]] = []
    room = 0
    for node in work:
        needs = closure(node)
        held = groups[-1][1] if groups else {}
        cost = sum(sizes.get(name, 0) for name in needs.keys() - held.keys())
        if not groups or (cost > room and held):
            groups.append(([], {}))
            room = limit
            cost = sum(sizes.get(name, 0) for name in needs)
        groups[-1][0].append(node)
        groups[-1][1].update(needs)
        room -= cost
    return _pieces(model, groups)


def _pieces(
    model: ModelProto, groups: Sequence[tuple[list[NodeProto], dict[str, TensorProto | NodeProto]]]
) -> tuple[Partition, ...]:
    graph = model.graph
    outputs = {value.name for value in graph.output}
    types = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    read_by = {
        name: i for i, (nodes, _) in enumerate(groups) for node in nodes for name in node.input
    }
    found = []
    for i, (nodes, constants) in enumerate(groups):
        made = {name for node in nodes for name in node.output}
        read = dict.fromkeys(n for node in nodes for n in node.input if n and n not in constants)
        takes = tuple(name for name in read if name not in made)
        gives = tuple(
            name
            for node in nodes
            for name in node.output
            if name in outputs or read_by.get(name, -1) > i
        )
        if untyped := [name for name in (*takes, *gives) if name not in types]:
            raise ExportError(f"{graph.name}: does not state the types of {', '.join(untyped)}")
        piece = ModelProto(ir_version=model.ir_version)
        piece.opset_import.extend(model.opset_import)
        piece.functions.extend(model.functions)
        piece.graph.name = f"{graph.name}.{i}"
        piece.graph.input.extend(types[name] for name in takes)
        piece.graph.output.extend(types[name] for name in gives)
        piece.graph.initializer.extend(c for c in constants.values() if isinstance(c, TensorProto))
        unpack = {c.output[0]: c for c in constants.values() if isinstance(c, NodeProto)}
        piece.graph.node.extend([*unpack.values(), *nodes])
        found.append(Partition(piece.SerializeToString(), takes, gives))
    return tuple(found)


def _sizes(graph: GraphProto) -> dict[str, int]:
    """Return bytes of the weights, and of what is computed from them."""
    found = {
        tensor.name: math.ceil(math.prod(tensor.dims) * _item_bytes(tensor.data_type))
        for tensor in graph.initializer
    }
    for value in graph.value_info:
        tensor = value.type.tensor_type
        dims = [d.dim_value for d in tensor.shape.dim if d.HasField("dim_value")]
        if len(dims) == len(tensor.shape.dim):
            found.setdefault(value.name, math.ceil(math.prod(dims) * _item_bytes(tensor.elem_type)))
    return found


def _item_bytes(elem_type: int) -> float:
    return float(ir.DataType(elem_type).itemsize)
