"""OpenVINO on the CPU. Reads the same ONNX files; buffers are numpy arrays, shared by address."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from bifrost_rt import formats
from bifrost_rt.backends import linked, openvino_operators
from bifrost_rt.backends.base import Buffer, HostMemory, check_bindings, return_freed_memory
from bifrost_rt.backends.choice import openvino_refuses
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import EngineSpec, Range
from bifrost_rt.processor import Processor

# Measured, benchmarks/results/residency.md: over the file's bytes 2.13 in float32 (half of it pages
# of the file) after the first run, and a few MiB for the graph itself. A format knows what it
# takes.
PLAIN = 2.2
FIXED = 8 << 20


class OpenVino(HostMemory):
    """The CPU plugin, in float32 wherever the graph is.

    Args:
        processor: None takes this machine's.
    """

    name = "openvino"
    arithmetic = "f32"
    # Its attention never has all scores in memory: of the 409 MB that are counted for the
    # benchmark's denoising step it took 180, of the VAE's 209, which has no attention, all
    # (benchmarks/results/residency.md).
    scratch_share = 0.75

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """Count the mapped file and a reordered copy, in float32 where 16 bit is stored."""
        factor = formats.in_memory(spec.precision.weights, OpenVino.name, PLAIN)
        return math.ceil(stored * factor) + FIXED

    def __init__(self, processor: Processor | None = None) -> None:
        self._core = ov.Core()
        openvino_operators.add_to(self._core)
        self._processor = processor

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> OpenVinoEngine:
        """Compile one graph with its weights.

        Raises:
            BackendError: OpenVINO does not accept the file, or would compute something else.
        """
        path = folder / spec.graph
        if refused := openvino_refuses(spec.precision.layers, self._processor):
            reason, hint = refused
            raise BackendError(f"{path}: {reason}", hint=hint)
        # Without these, processors with bf16 arithmetic silently run float32 files in it, and
        # weights of 4 bits quietly get activations of 8.
        options = {
            "INFERENCE_PRECISION_HINT": self.arithmetic,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "PERFORMANCE_HINT": "LATENCY",
        }
        try:
            by_address = linked.in_memory(folder, spec)
            if by_address is None:
                mapped, graph = [], path
            else:
                mapped, graph = by_address[1], self._core.read_model(by_address[0])
            model = self._core.compile_model(graph, "CPU", options)
        except BackendError:
            raise
        except Exception as error:  # OpenVINO raises RuntimeError and its own types
            raise BackendError(
                f"{path}: OpenVINO {ov.__version__} cannot load this engine: {error}",
                hint="rebuild the set with `python -m export.build`, or run it with "
                "backend='onnxruntime'",
            ) from error
        return OpenVinoEngine(model, spec, dimensions, mapped)


class OpenVinoBf16(OpenVino):
    """bfloat16 where the graph is float32, on processors that have it: faster, and not exact."""

    name = "openvino-bf16"
    arithmetic = "bf16"


class OpenVinoEngine:
    """One compiled model with one request: its activations are in memory once."""

    def __init__(
        self,
        model: ov.CompiledModel,
        spec: EngineSpec,
        dimensions: Mapping[str, Range],
        mapped: Sequence[NDArray[Any]] = (),
    ) -> None:
        self.spec = spec
        self._mapped = mapped
        self._request: ov.InferRequest | None = model.create_infer_request()
        self._dimensions = dimensions
        self._set: dict[str, ov.Tensor] = {}

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return a call on these arrays' memory."""
        check_bindings(self.spec, self._dimensions, inputs, outputs)
        if self._request is None:
            raise BackendError(f"engine `{self.spec.name}` is closed")
        tensors = {
            name: ov.Tensor(np.asarray(buffer), shared_memory=True)
            for name, buffer in {**inputs, **outputs}.items()
        }
        return functools.partial(self._run, self._request, tensors)

    def _run(self, request: ov.InferRequest, tensors: dict[str, ov.Tensor]) -> None:
        # a loop's two calls differ in what they carry; the cache and the schedules stay set
        for name, tensor in tensors.items():
            if self._set.get(name) is not tensor:
                request.set_tensor(name, tensor)
                self._set[name] = tensor
        request.infer()

    def close(self) -> None:
        """Drop the request and with it the compiled model, and hand what it had back."""
        self._request = None
        self._mapped = ()
        self._set.clear()
        return_freed_memory()
