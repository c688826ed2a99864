"""TensorRT-RTX and TensorRT: compiled engines on an NVIDIA GPU, one driver for both.

The two libraries share the names that are used here; what only one of them has is asked for with
`hasattr`. An engine fits one version of one library and the architectures that it was compiled for,
which the manifest states, so a foreign one is refused before the library sees it.
"""

from __future__ import annotations

import functools
import importlib
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bifrost_rt.backends import gpu, tensorrt_log
from bifrost_rt.backends.base import Buffer, check_bindings
from bifrost_rt.backends.cuda import Cuda, Device, DeviceBuffer
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import Compiled, EngineSpec, Range


def refusal(name: str, version: str, architecture: str, compiled: Compiled | None) -> str | None:
    """Why an engine cannot run here, or None: from the manifest alone.

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
    """

    name = "tensorrt"
    module = "tensorrt"

    def __init__(
        self,
        library: Any = None,
        device: Device | None = None,
        architecture: str | None = None,
    ) -> None:
        if library is None:
            library = importlib.import_module(self.module)
            self._log = tensorrt_log.logger(self.module)
        else:
            self._log = library.logger
        if architecture is None:
            found = gpu.find()
            if isinstance(found, str):
                raise BackendError(f"backend {self.name!r} is not available: {found}")
            architecture = found.architecture
        self._library, self._architecture = library, architecture
        self._device: Device = Cuda() if device is None else device
        self._runtime = library.Runtime(self._log)

    def free_memory(self) -> int:
        """The GPU's."""
        return self._device.free_bytes()

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """The file holds the weights as the GPU does. Not measured."""
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
        context = None if engine is None else engine.create_execution_context()
        if context is None:
            raise BackendError(
                f"{path}: {self.name} {version} cannot load this engine: {_why(self._log)}",
                hint=self._compile_again(),
            )
        self._check_door(path, spec, engine)
        return TensorRtEngine(self, spec, dimensions, (engine, context))

    def _check_door(self, path: Path, spec: EngineSpec, engine: Any) -> None:
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        promised = [tensor.name for tensor in (*spec.inputs, *spec.outputs)]
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

    def run(self, context: Any) -> None:
        """Queue the engine, and wait for it: an error belongs to the stage that made it, and so
        does its time.

        Raises:
            BackendError: the library or the GPU failed.
        """
        if not context.execute_async_v3(self._device.stream):
            raise BackendError(f"{self.name} could not run the engine: {_why(self._log)}")
        self._device.wait()

    def refused(self, what: str) -> BackendError:
        """The error of a context that does not take a shape or an address."""
        return BackendError(f"{what}: {self.name} refuses it: {_why(self._log)}")

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceBuffer:
        """Memory of the GPU."""
        return DeviceBuffer(self._device, shape, dtype)

    def upload(self, array: NDArray[Any]) -> DeviceBuffer:
        """A copy on the GPU."""
        buffer = self.empty(array.shape, array.dtype)
        self._device.copy_in(buffer.address, np.ascontiguousarray(array))
        return buffer

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """A copy in the same place."""
        if buffer.shape != array.shape or buffer.dtype != array.dtype:
            raise BackendError(
                f"cannot write {array.dtype}{list(array.shape)} over "
                f"{buffer.dtype}{list(buffer.shape)}"
            )
        self._device.copy_in(_on_device("buffer", buffer).address, np.ascontiguousarray(array))

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """A copy in host memory."""
        array = np.empty(buffer.shape, buffer.dtype)
        self._device.copy_out(array, _on_device("buffer", buffer).address)
        return array


class TensorRtRtx(TensorRt):
    """TensorRT for RTX cards."""

    name = "tensorrt-rtx"
    module = "tensorrt_rtx"


class TensorRtEngine:
    """One execution context: its scratch memory is on the GPU once, whatever is bound."""

    def __init__(
        self,
        driver: TensorRt,
        spec: EngineSpec,
        dimensions: Mapping[str, Range],
        opened: tuple[Any, Any],
    ) -> None:
        self.spec = spec
        self._driver = driver
        self._dimensions = dimensions
        self._opened: tuple[Any, Any] | None = opened  # the engine, and its context
        self._set: dict[str, tuple[tuple[int, ...], int]] = {}

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """A call on these buffers, which it keeps alive."""
        check_bindings(self.spec, self._dimensions, inputs, outputs)
        if self._opened is None:
            raise BackendError(f"stage `{self.spec.name}` is closed")
        given = {**inputs, **outputs}
        buffers = {
            name: _on_device(f"stage `{self.spec.name}`, `{name}`", buffer)
            for name, buffer in given.items()
        }
        return functools.partial(self._run, self._opened[1], buffers, frozenset(inputs))

    def _run(
        self, context: Any, buffers: Mapping[str, DeviceBuffer], inputs: frozenset[str]
    ) -> None:
        # a loop's two calls differ in what they carry; the cache and the schedules stay set
        for name, buffer in buffers.items():
            shape, address = self._set.get(name, (None, None))
            ok = True
            if name in inputs and shape != buffer.shape:
                ok = context.set_input_shape(name, buffer.shape)
            if ok and address != buffer.address:
                ok = context.set_tensor_address(name, buffer.address)
            if not ok:
                self._set.pop(name, None)
                where = f"stage `{self.spec.name}`, `{name}` {buffer.dtype}{list(buffer.shape)}"
                raise self._driver.refused(where)
            self._set[name] = (buffer.shape, buffer.address)
        self._driver.run(context)

    def close(self) -> None:
        """Drop the context and the engine with its weights."""
        self._opened = None
        self._set.clear()


def _on_device(what: str, buffer: Buffer) -> DeviceBuffer:
    if not isinstance(buffer, DeviceBuffer):
        raise BackendError(f"{what}: is in host memory; upload it first")
    return buffer


def _why(log: Any) -> str:
    """The first of what was logged: the rest follows from it."""
    said = [" ".join(message.split()) for message in log.take()]
    return said[0][:400] if said else "it does not say why"
