"""onnxruntime on an NVIDIA GPU: the files of a CPU, for cards that TensorRT-RTX does not cover.

Buffers are onnxruntime's own device memory, so nothing beside its package is needed. It never falls
back to the CPU in silence: a provider that does not start is an error, and so is arithmetic that it
would leave to the CPU.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from bifrost_rt import formats
from bifrost_rt.backends import gpu, linked
from bifrost_rt.backends.base import Buffer, check_bindings
from bifrost_rt.backends.cuda_provider import (
    CPU,
    PROVIDER,
    in_words,
    left_to_cpu,
    load_libraries,
)
from bifrost_rt.backends.onnxruntime import keep_exact
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import EngineSpec, Range

OPTIONS = {
    # float32 means float32: TF32, which is on unless it is cleared, keeps 10 bits of mantissa
    "use_tf32": "0",
    "cudnn_conv_algo_search": "HEURISTIC",
    # otherwise memory grows in powers of two, and weights of 1.1 GB took 2.2 GB
    "arena_extend_strategy": "kSameAsRequested",
}
# Measured on an H200 (benchmarks/results/gpu.md): what a session takes for itself, most of it
# cuBLAS's workspaces, which are smaller before Hopper.
FIXED = 68 << 20
QUANTIZED = 4.2  # over the file's bytes, where a format does not know what it takes
_GRAPHS = itertools.count(1)  # numbers of recorded graphs; -1 means none


class OrtBuffer:
    """A tensor in onnxruntime's device memory."""

    def __init__(self, value: ort.OrtValue, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.value, self.shape = value, tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)


class OnnxRuntimeCuda:
    """The CUDA execution provider.

    Args:
        graphs: whether the steps of loops become CUDA graphs, by the provider's own option. An
            image of the demo model then takes half of the time on an H200. Off by default:
            onnxruntime's memory cannot grow while it records. On an H200 that failed, and took the
            process with it, where another thread drew, and where engines came and went; one thread
            with all engines in memory drew right.
        provider, device: a test passes the CPU's.

    Attributes:
        eager: engine -> the reason why its steps are queued one kernel at a time.
    """

    name = "onnxruntime-cuda"
    scratch_share = 1.0
    in_host_memory = False
    # A replay is compared with a run on the same inputs, which must still be there.
    writes_in_place = False

    def __init__(
        self, graphs: bool = False, provider: str = PROVIDER, device: str = "cuda"
    ) -> None:
        self.graphs, self.provider, self.device = graphs, provider, device
        self.eager: dict[str, str] = {}
        self._queued: ort.IOBinding | None = None
        self._not_loaded = load_libraries() if provider == PROVIDER else ""

    @property
    def opens_in_threads(self) -> bool:
        """Without CUDA graphs: whoever takes memory of the GPU while a step is recorded breaks the
        recording, and opening an engine does."""
        return not self.graphs

    def free_memory(self) -> int | None:
        """Return the GPU's."""
        return gpu.free_bytes() if self.provider == PROVIDER else None

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """Count weights as they are held: what is quantized comes to float32 at the latest where it
        is multiplied."""
        factor = formats.in_memory(spec.precision.weights, self.name, QUANTIZED)
        return math.ceil(stored * factor) + FIXED

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> OnnxRuntimeCudaEngine:
        """Load one graph with its weights.

        Raises:
            BackendError: onnxruntime does not accept the file, its provider does not start, or it
                would compute part of the graph on the CPU.
        """
        graphs = self.graphs and bool(spec.state)
        session = None
        if graphs:
            try:
                session = self._session(folder, spec, graphs=True)
            except BackendError as error:
                reason = error.message
        if session is None:
            session = self._session(folder, spec, graphs=False)
            if graphs:
                graphs = False
                self.give_up_graphs(spec.name, reason)
        return OnnxRuntimeCudaEngine(self, session, spec, dimensions, graphs)

    def _session(self, folder: Path, spec: EngineSpec, *, graphs: bool) -> ort.InferenceSession:
        path = folder / spec.graph
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        keep_exact(options, spec)
        settings = {**OPTIONS, "enable_cuda_graph": str(int(graphs))}
        on_gpu = self.provider == PROVIDER
        providers = [(PROVIDER, settings), CPU] if on_gpu else [self.provider]
        try:
            session = ort.InferenceSession(
                linked.for_onnxruntime(folder, spec, options),
                sess_options=options,
                providers=providers,
            )
        except BackendError:
            raise
        except Exception as error:  # onnxruntime raises many unrelated types here
            raise BackendError(
                f"{path}: onnxruntime {ort.__version__} cannot load this engine: {error}",
                hint="rebuild the set with `python -m export.build --backend onnxruntime`",
            ) from error
        if self.provider not in session.get_providers():
            why = self._not_loaded or (
                "a CUDA or cuDNN library that it was built for does not fit the NVIDIA driver"
            )
            raise BackendError(
                f"{path}: onnxruntime {ort.__version__} could not start its {self.provider}: {why}",
                hint="pip install 'bifrost-rt[cuda]' brings CUDA's libraries and cuDNN; for "
                "CUDA 13 the NVIDIA driver must be 580 or newer",
            )
        if left := left_to_cpu(session.get_provider_graph_assignment_info(), self.provider):
            raise BackendError(
                f"{path}: onnxruntime {ort.__version__} would compute {', '.join(left)} on the CPU",
                hint="upgrade onnxruntime-gpu",
            )
        return session

    def give_up_graphs(self, engine: str, reason: str) -> None:
        """Note that an engine's steps run without CUDA graphs, and say so."""
        self.eager[engine] = reason
        logging.getLogger(__name__).warning(
            "%s: %s: runs without a CUDA graph: %s", self.name, engine, reason
        )

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> OrtBuffer:
        """Uninitialised memory of the GPU."""
        with in_words(f"memory for {np.dtype(dtype)}{list(shape)}"):
            value = ort.OrtValue.ortvalue_from_shape_and_type(
                shape, np.dtype(dtype), self.device, 0
            )
        return OrtBuffer(value, shape, dtype)

    def upload(self, array: NDArray[Any]) -> OrtBuffer:
        """Return a copy on the GPU."""
        array = np.ascontiguousarray(array)
        with in_words(f"memory for {array.dtype}{list(array.shape)}"):
            value = ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        return OrtBuffer(value, array.shape, array.dtype)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copy an array over a buffer."""
        if buffer.shape != array.shape or buffer.dtype != array.dtype:
            raise BackendError(
                f"cannot write {array.dtype}{list(array.shape)} over "
                f"{buffer.dtype}{list(buffer.shape)}"
            )
        self.wait()
        _on_device("buffer", buffer).value.update_inplace(np.ascontiguousarray(array))

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """Return a copy in host memory."""
        self.wait()
        return np.array(_on_device("buffer", buffer).value.numpy())

    def queued(self, binding: ort.IOBinding) -> None:
        """Note a call that was not waited for."""
        self._queued = binding

    def wait(self) -> None:
        """Until the last queued call is done, and with it those before."""
        if self._queued is not None:
            queued, self._queued = self._queued, None
            with in_words("a queued step"):
                queued.synchronize_outputs()


class OnnxRuntimeCudaEngine:
    """One session."""

    def __init__(
        self,
        backend: OnnxRuntimeCuda,
        session: ort.InferenceSession,
        spec: EngineSpec,
        dimensions: Mapping[str, Range],
        graphs: bool,
    ) -> None:
        self.spec, self.graphs = spec, graphs
        self.recorded_in: int | None = None  # the thread
        self._backend, self._dimensions = backend, dimensions
        self._session: ort.InferenceSession | None = session

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return a call on these buffers, which it keeps alive. A step of a loop is queued
        alone."""
        check_bindings(self.spec, self._dimensions, inputs, outputs)
        session = self._session
        if session is None:
            raise BackendError(f"engine `{self.spec.name}` is closed")
        binding = session.io_binding()
        for bind, tensors in (
            (binding.bind_ortvalue_input, inputs),
            (binding.bind_ortvalue_output, outputs),
        ):
            for name, buffer in tensors.items():
                bind(name, _on_device(f"engine `{self.spec.name}`, `{name}`", buffer).value)
        return _Call(self, self._backend, session, binding, outputs)

    def close(self) -> None:
        """Drop the session with its weights."""
        self._backend.wait()
        self._session = None


class _Call:
    """A session on fixed buffers. The first call of an engine whose steps are replayed runs both
    ways: where the results are not the same bits, its steps are queued kernel by kernel."""

    def __init__(
        self,
        engine: OnnxRuntimeCudaEngine,
        backend: OnnxRuntimeCuda,
        session: ort.InferenceSession,
        binding: ort.IOBinding,
        outputs: Mapping[str, Buffer],
    ) -> None:
        self._engine, self._backend = engine, backend
        self._session, self._binding, self._outputs = session, binding, tuple(outputs.values())
        self._loop = bool(engine.spec.state)
        self._eager = self._options(-1)
        self._replay = self._eager
        if engine.graphs:
            number = next(_GRAPHS)
            self._replay = self._options(number)
            if hasattr(session, "release_captured_graph"):
                weakref.finalize(self, session.release_captured_graph, number).atexit = False

    def _options(self, graph: int) -> ort.RunOptions:
        options = ort.RunOptions()
        if self._loop:
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def __call__(self) -> None:
        """Run it."""
        engine, here = self._engine, threading.get_ident()
        if engine.graphs and engine.recorded_in is None:
            engine.recorded_in = here
            if self._read(self._eager) != self._read(self._replay):
                self._give_up("its first replay differs from the eager run")
        elif engine.graphs and engine.recorded_in != here:
            # onnxruntime would record again, once for every thread
            self._give_up("its steps were recorded in another thread")
        self._run(self._replay if engine.graphs else self._eager)

    def _give_up(self, reason: str) -> None:
        self._engine.graphs = False
        self._backend.give_up_graphs(self._engine.spec.name, reason)

    def _run(self, options: ort.RunOptions) -> None:
        with in_words(f"engine `{self._engine.spec.name}`"):
            self._session.run_with_iobinding(self._binding, options)
        if self._loop:
            self._backend.queued(self._binding)

    def _read(self, options: ort.RunOptions) -> list[bytes]:
        """Return the outputs, from memory that was overwritten before."""
        for buffer in self._outputs:
            wiped = np.full(int(np.prod(buffer.shape)) * buffer.dtype.itemsize, 0xFF, np.uint8)
            self._backend.write(buffer, wiped.view(buffer.dtype).reshape(buffer.shape))
        self._run(options)
        return [self._backend.download(buffer).tobytes() for buffer in self._outputs]


def _on_device(what: str, buffer: Buffer) -> OrtBuffer:
    if not isinstance(buffer, OrtBuffer):
        raise BackendError(f"{what}: is in host memory; upload it first")
    return buffer
