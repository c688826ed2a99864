"""TensorRT-RTX and TensorRT: compiled engines on an NVIDIA GPU, one driver for both.

The two libraries share the names that are used here; what only one of them has is asked for with
`hasattr`. An engine fits one version of one library and the architectures that it was compiled for,
which the manifest states, so a foreign one is refused before the library sees it.

How an engine is run, its steps as CUDA graphs, is in `tensorrt_engine.py`.
"""

from __future__ import annotations

import importlib
import mmap
import re
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bifrost_rt.backends import gpu, tensorrt_log
from bifrost_rt.backends.base import Buffer
from bifrost_rt.backends.cuda import Cuda, Device, DeviceBuffer
from bifrost_rt.backends.kernels import Kernels
from bifrost_rt.backends.tensorrt_engine import NoContext, TensorRtEngine, Weights, on_device
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import Compiled, EngineSpec, Range
from bifrost_rt.opened import Identity, identity

# What the graphs need of it: `Attention` came to the parser in 10.14, `RMSNormalization` in 10.15.
OLDEST = {"tensorrt": (10, 15)}


def too_old(name: str, version: str) -> tuple[str, str] | None:
    """Say why a library of this version cannot be used, and what to do; None where it can."""
    oldest = OLDEST.get(name)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if oldest is None or numbers >= oldest:
        return None
    wanted = ".".join(map(str, oldest))
    return (
        f"{name} {version} is too old: the graphs need {wanted} or newer",
        "on a Jetson, JetPack 7.2 brings it (JetPack 6 cannot); elsewhere "
        f"pip install 'bifrost-rt[{name}]'",
    )


def refusal(name: str, version: str, architecture: str, compiled: Compiled | None) -> str | None:
    """Say why an engine cannot run here, or None: from the manifest alone.

    Args:
        name, version: the library's.
        architecture: this machine's, such as "sm89".
        compiled: the manifest's word on the engine.
    """
    if compiled is None:
        return "is an ONNX graph, not a compiled engine"
    if compiled.builder != name:
        return f"was compiled by {compiled.builder}, this is {name}"
    if compiled.version != version:
        return f"was compiled by {name} {compiled.version}, this is {version}"
    if architecture not in compiled.targets:
        return f"was compiled for {', '.join(compiled.targets)}, this GPU is {architecture}"
    return None


class TensorRt:
    """TensorRT, as on Jetson.

    Args:
        library: the Python module, and
        device: the GPU, and
        architecture: its kind; a test passes doubles of all three.
        graphs: whether the steps of loops become CUDA graphs.

    Attributes:
        eager: engine -> the reason why its steps are queued one kernel at a time.
    """

    name = "tensorrt"
    opens_in_threads = False  # never tried on a GPU
    scratch_share = 1.0
    # A replay is compared with a run on the same inputs, which must still be there.
    writes_in_place = False
    module = "tensorrt"

    def __init__(
        self,
        library: Any = None,
        device: Device | None = None,
        architecture: str | None = None,
        graphs: bool = True,
    ) -> None:
        if library is None:
            try:
                library = importlib.import_module(self.module)
            except (ImportError, OSError) as error:  # a shared library that it needs is not there
                raise BackendError(
                    f"backend {self.name!r} is installed and cannot be loaded: {error}",
                    hint=f"reinstall it: pip install --force-reinstall 'bifrost-rt[{self.name}]'",
                ) from error
            self._log = tensorrt_log.logger(self.module)
        else:
            self._log = library.logger
        if reason := too_old(self.name, str(library.__version__)):
            raise BackendError(f"backend {self.name!r}: {reason[0]}", hint=reason[1])
        name = str(architecture)
        if architecture is None:
            found = gpu.find()
            if isinstance(found, str):
                raise BackendError(f"backend {self.name!r} is not available: {found}")
            name, architecture = found.name, found.architecture
        self._library, self._architecture = library, architecture
        self._device: Device = Cuda() if device is None else device
        self._runtime = library.Runtime(self._log)
        version = str(library.__version__)
        self._kernels = Kernels((name, architecture, self.name, version, gpu.driver_version()))
        self._opened = 0
        # weights that opened engines hold, by file and bytes of it
        self._resident: weakref.WeakValueDictionary[
            tuple[Identity | None, int, int], DeviceBuffer
        ] = weakref.WeakValueDictionary()
        self.graphs = graphs
        self.eager: dict[str, str] = {}

    @property
    def in_host_memory(self) -> bool:
        """Whether the GPU shares the machine's memory."""
        return self._device.unified

    def free_memory(self) -> int:
        """Return the GPU's."""
        return self._device.free_bytes()

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """Return the file's bytes: it holds the weights as the GPU does. Not measured."""
        return stored

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> TensorRtEngine:
        """Load one engine.

        Raises:
            BackendError: it is not for this library, this version or this GPU; the file is foreign
                or truncated; or the GPU's memory is full.
        """
        path = folder / spec.graph
        version = str(self._library.__version__)
        if reason := refusal(self.name, version, self._architecture, spec.compiled):
            raise BackendError(f"{path}: this engine {reason}", hint=self._compile_again())
        self._log.take()
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                engine = self._runtime.deserialize_cuda_engine(m)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise BackendError(f"{path}: {error}", hint=self._compile_again()) from None
        if engine is None:
            raise self._cannot_load(path)
        self._check_door(path, spec, engine)
        try:
            weights = self._upload(folder, spec)
            made = TensorRtEngine(self, spec, dimensions, engine, weights)
        except NoContext:
            raise self._cannot_load(path) from None
        self._opened += 1
        return made

    def closed(self) -> None:
        """Note that an engine was closed: after the last one, what was compiled for them is
        kept."""
        self._opened -= 1
        if not self._opened:
            self._kernels.keep()

    def _cannot_load(self, path: Path) -> BackendError:
        return BackendError(
            f"{path}: {self.name} {self._library.__version__} cannot load this engine: "
            f"{_why(self._log)}",
            hint=self._compile_again(),
        )

    def _upload(self, folder: Path, spec: EngineSpec) -> Weights:
        """Return the weights that the engine does not hold, and where each of them lies: its own
        file in one piece, and what it reads of other engines' files, where those are not there
        already."""
        found: dict[str, int] = {}
        held: dict[tuple[str, int], DeviceBuffer] = {}
        for weight in spec.compiled.weights if spec.compiled else ():
            path = folder / weight.file
            whole = path.stat().st_size
            if weight.offset + weight.size > whole:
                raise BackendError(
                    f"{path}: ends before the weight {weight.name}", hint=self._compile_again()
                )
            start, size = weight.offset, weight.size
            if weight.file in spec.files or (identity(path), 0, whole) in self._resident:
                start, size = 0, whole
            if (weight.file, start) not in held:
                held[weight.file, start] = self._in_memory(path, start, size)
            found[weight.name] = held[weight.file, start].address + weight.offset - start
        return Weights(found, tuple(held.values()))

    def _in_memory(self, path: Path, start: int, size: int) -> DeviceBuffer:
        """Return bytes of a file, uploaded unless an engine that is open holds them."""
        key = (identity(path), start, size)
        buffer = self._resident.get(key)
        if buffer is None:
            # pages of the file: they are read while they are copied
            buffer = self.upload(np.memmap(path, np.uint8, "r", start, (size,)))
            self._resident[key] = buffer
        return buffer

    def context(self, engine: Any, *, graph: bool) -> Any:
        """Return a context without scratch memory of its own; None where the library makes none.

        Args:
            graph: whether the library shall record and replay its work by itself.
        """
        own = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.library_graphs:
            return engine.create_execution_context(own)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(own)
        # kernels for a shape are compiled when it first comes: compiled in the background they
        # would take over in the middle of a loop, and one seed would not give one image
        strategies = self._library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._kernels.use(config)
        if graph:
            config.cuda_graph_strategy = self._library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return engine.create_execution_context(config)

    @property
    def library_graphs(self) -> bool:
        """Whether the library has CUDA graphs of its own: it records again when its kernels change,
        which recording its stream cannot notice."""
        return hasattr(self._library, "CudaGraphStrategy")

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work on the stream as a graph."""
        return self._device.capture(work)

    def capturable(self, context: Any) -> bool:
        """Say whether the library says that a context's work can be recorded; older ones do not
        say."""
        ask = getattr(context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._device.stream))

    def _check_door(self, path: Path, spec: EngineSpec, engine: Any) -> None:
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        promised = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
        promised += [weight.name for weight in spec.compiled.weights] if spec.compiled else []
        if sorted(names) != sorted(promised):
            raise BackendError(
                f"{path}: the engine's tensors are {', '.join(names)}, the manifest's "
                + ", ".join(promised),
                hint=self._compile_again(),
            )
        device = self._library.TensorLocation.DEVICE
        if on_host := [name for name in names if engine.get_tensor_location(name) != device]:
            raise BackendError(
                f"{path}: the engine wants {', '.join(on_host)} in host memory",
                hint=self._compile_again(),
            )

    def _compile_again(self) -> str:
        return (
            f"python -m export.compile ONNX_SET --backend {self.name} --target "
            f"{self._architecture} --output DIR"
        )

    def enqueue(self, context: Any) -> None:
        """Queue an engine's work.

        Raises:
            BackendError: the library failed; what the GPU fails in shows when it is waited for.
        """
        if not context.execute_async_v3(self._device.stream):
            raise BackendError(f"{self.name} could not run the engine: {_why(self._log)}")

    def warnings(self) -> list[str]:
        """Return what the library has warned of since the last call."""
        found: list[str] = self._log.take_warnings()
        return found

    def wait(self) -> None:
        """Until everything that was queued is done."""
        self._device.wait()

    def refused(self, what: str) -> BackendError:
        """Return the error of a context that does not take a shape or an address."""
        return BackendError(f"{what}: {self.name} refuses it: {_why(self._log)}")

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceBuffer:
        """Memory of the GPU."""
        return DeviceBuffer(self._device, shape, dtype)

    def upload(self, array: NDArray[Any]) -> DeviceBuffer:
        """Return a copy on the GPU."""
        buffer = self.empty(array.shape, array.dtype)
        self._device.copy_in(buffer.address, np.ascontiguousarray(array))
        return buffer

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copy an array over a buffer."""
        if buffer.shape != array.shape or buffer.dtype != array.dtype:
            raise BackendError(
                f"cannot write {array.dtype}{list(array.shape)} over "
                f"{buffer.dtype}{list(buffer.shape)}"
            )
        self._device.copy_in(on_device("buffer", buffer).address, np.ascontiguousarray(array))

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """Return a copy in host memory."""
        array = np.empty(buffer.shape, buffer.dtype)
        self._device.copy_out(array, on_device("buffer", buffer).address)
        return array


class TensorRtRtx(TensorRt):
    """TensorRT for RTX cards."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"


def _why(log: Any) -> str:
    """Return the first of what was logged: the rest follows from it."""
    said = [" ".join(message.split()) for message in log.take()]
    return said[0][:400] if said else "it does not say why"
