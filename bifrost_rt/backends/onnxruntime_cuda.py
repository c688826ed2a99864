"""onnxruntime on an NVIDIA GPU: the files of a CPU, for cards that TensorRT-RTX does not cover.

Buffers are onnxruntime's own device memory, so nothing beside its package is needed. It never falls
back to the CPU in silence: a provider that does not start is an error, and so is arithmetic that it
would leave to the CPU.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import DTypeLike, NDArray

from bifrost_rt.backends import linked
from bifrost_rt.backends.base import Buffer, check_bindings
from bifrost_rt.backends.onnxruntime import keep_exact
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import EngineSpec, Range

PROVIDER, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
# float32 means float32: TF32, which is on unless it is cleared, keeps 10 bits of mantissa.
OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
# Operators that belong on the GPU; sizes are rightly computed on the CPU.
ARITHMETIC = ("MatMul", "FusedMatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Softmax")
_GRAPHS = itertools.count(1)  # numbers of recorded graphs; -1 means none


class OrtBuffer:
    """A tensor in onnxruntime's device memory."""

    def __init__(self, value: ort.OrtValue, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.value, self.shape = value, tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)


class OnnxRuntimeCuda:
    """The CUDA execution provider.

    Args:
        graphs: whether the steps of loops become CUDA graphs, by the provider's own option. Off by
            default: onnxruntime waits for each replay, so little is won.
        provider, device: a test passes the CPU's.
    """

    name = "onnxruntime-cuda"
    opens_in_threads = False  # never tried on a GPU
    scratch_share = 1.0

    def __init__(
        self, graphs: bool = False, provider: str = PROVIDER, device: str = "cuda"
    ) -> None:
        self.graphs, self.provider, self.device = graphs, provider, device
        self._queued: ort.IOBinding | None = None

    def free_memory(self) -> int | None:
        """onnxruntime does not say."""
        return None

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """16 bit is unpacked to float32. Not measured."""
        sixteen = spec.precision.weights in ("float16", "bfloat16")
        return math.ceil(stored * (2.1 if sixteen else 1.05))

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> OnnxRuntimeCudaEngine:
        """Load one graph with its weights.

        Raises:
            BackendError: onnxruntime does not accept the file, its provider does not start, or it
                would compute part of the graph on the CPU.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        keep_exact(options, spec)
        path = folder / spec.graph
        graphs = self.graphs and bool(spec.carry)
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
            raise BackendError(
                f"{path}: onnxruntime {ort.__version__} could not start its {self.provider}: a "
                "CUDA or cuDNN library that it was built for is missing or does not fit the driver",
                hint="install the CUDA and cuDNN versions that its release notes name",
            )
        if left := left_to_cpu(session.get_provider_graph_assignment_info(), self.provider):
            raise BackendError(
                f"{path}: onnxruntime {ort.__version__} would compute {', '.join(left)} on the CPU",
                hint="upgrade onnxruntime-gpu",
            )
        return OnnxRuntimeCudaEngine(self, session, spec, dimensions, graphs)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> OrtBuffer:
        """Uninitialised memory of the GPU."""
        value = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.dtype(dtype), self.device, 0)
        return OrtBuffer(value, shape, dtype)

    def upload(self, array: NDArray[Any]) -> OrtBuffer:
        """A copy on the GPU."""
        array = np.ascontiguousarray(array)
        value = ort.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        return OrtBuffer(value, array.shape, array.dtype)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """A copy in the same place."""
        if buffer.shape != array.shape or buffer.dtype != array.dtype:
            raise BackendError(
                f"cannot write {array.dtype}{list(array.shape)} over "
                f"{buffer.dtype}{list(buffer.shape)}"
            )
        self.wait()
        _on_device("buffer", buffer).value.update_inplace(np.ascontiguousarray(array))

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """A copy in host memory."""
        self.wait()
        return np.array(_on_device("buffer", buffer).value.numpy())

    def queued(self, binding: ort.IOBinding) -> None:
        """Note a call that was not waited for."""
        self._queued = binding

    def wait(self) -> None:
        """Until the last queued call is done, and with it those before."""
        if self._queued is not None:
            self._queued.synchronize_outputs()
            self._queued = None


class OnnxRuntimeCudaEngine:
    """One session."""

    def __init__(
        self,
        driver: OnnxRuntimeCuda,
        session: ort.InferenceSession,
        spec: EngineSpec,
        dimensions: Mapping[str, Range],
        graphs: bool,
    ) -> None:
        self.spec = spec
        self._driver, self._dimensions, self._graphs = driver, dimensions, graphs
        self._session: ort.InferenceSession | None = session

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """A call on these buffers, which it keeps alive. A step of a loop is queued alone."""
        check_bindings(self.spec, self._dimensions, inputs, outputs)
        session = self._session
        if session is None:
            raise BackendError(f"stage `{self.spec.name}` is closed")
        binding = session.io_binding()
        for bind, tensors in (
            (binding.bind_ortvalue_input, inputs),
            (binding.bind_ortvalue_output, outputs),
        ):
            for name, buffer in tensors.items():
                bind(name, _on_device(f"stage `{self.spec.name}`, `{name}`", buffer).value)
        return _Call(self._driver, session, binding, bool(self.spec.carry), self._graphs)

    def close(self) -> None:
        """Drop the session with its weights."""
        self._driver.wait()
        self._session = None


class _Call:
    """A session on fixed buffers."""

    def __init__(
        self,
        driver: OnnxRuntimeCuda,
        session: ort.InferenceSession,
        binding: ort.IOBinding,
        loop: bool,
        graph: bool,
    ) -> None:
        self._driver, self._session, self._binding, self._loop = driver, session, binding, loop
        self._options = ort.RunOptions()
        if loop:
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        number = next(_GRAPHS) if graph else -1
        self._options.add_run_config_entry("gpu_graph_id", str(number))
        if graph and hasattr(session, "release_captured_graph"):
            weakref.finalize(self, session.release_captured_graph, number).atexit = False

    def __call__(self) -> None:
        """Run it."""
        self._session.run_with_iobinding(self._binding, self._options)
        if self._loop:
            self._driver.queued(self._binding)


def left_to_cpu(assigned: Iterable[Any], provider: str) -> list[str]:
    """The arithmetic that onnxruntime gave to the CPU beside a provider, by operator."""
    if provider == CPU:
        return []
    return sorted(
        {
            node.op_type
            for part in assigned
            if part.ep_name == CPU
            for node in part.get_nodes()
            if node.op_type in ARITHMETIC
        }
    )


def _on_device(what: str, buffer: Buffer) -> OrtBuffer:
    if not isinstance(buffer, OrtBuffer):
        raise BackendError(f"{what}: is in host memory; upload it first")
    return buffer
