"""Memory of a GPU, one stream and its graphs, through NVIDIA's own Python bindings; no torch.

`Device` is the seam under the TensorRT backend: its tests pass a double that keeps everything in
host memory.
"""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bifrost_rt import memory_plan
from bifrost_rt.errors import BackendError

# What the functions of the runtime may answer, and what then is to be done.
OLD_DRIVER, FULL = 35, 2  # cudaErrorInsufficientDriver, cudaErrorMemoryAllocation


class Device(Protocol):
    """What the backend asks of a GPU. Addresses and the stream are plain numbers."""

    stream: int

    @property
    def unified(self) -> bool:
        """Whether it shares the machine's memory."""

    def free_bytes(self) -> int:
        """Memory that can be had."""

    def allocate(self, size: int) -> int:
        """`size` bytes, and their address."""

    def free(self, address: int) -> None:
        """Give them back."""

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """Copy a contiguous host array to the device; it is done when this returns."""

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """Device to a contiguous host array; done when it returns."""

    def wait(self) -> None:
        """Until the stream has done everything."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` puts on the stream, without doing it. The result does it.

        Raises:
            BackendError: it cannot be recorded, or nothing was put there.
        """


class Cuda:
    """The first GPU that the process may use.

    Args:
        runtime: the module `cuda.bindings.runtime`; a test passes a double.

    Raises:
        BackendError: the NVIDIA driver is too old for the bindings, or cannot start.
    """

    def __init__(self, runtime: Any = None) -> None:
        self._runtime: Any = runtime or importlib.import_module("cuda.bindings.runtime")
        # Not one that waits for the legacy default stream: work of any other library there would
        # break a recording.
        flag = self._runtime.cudaStreamNonBlocking
        self.stream = int(self._call("cudaStreamCreateWithFlags", flag))
        kinds = self._runtime.cudaMemcpyKind
        self._in, self._out = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        integrated = self._runtime.cudaDeviceAttr.cudaDevAttrIntegrated
        self._unified = bool(self._call("cudaDeviceGetAttribute", integrated, 0))

    @property
    def unified(self) -> bool:
        """Whether it shares the machine's memory."""
        return self._unified

    def free_bytes(self) -> int:
        """Of this GPU. Where it shares the machine's memory, what the machine can give: there CUDA
        leaves out the pages of files, which are given up when somebody asks for memory."""
        if self._unified and (free := memory_plan.host_memory()) is not None:
            return free
        return int(self._call("cudaMemGetInfo"))

    def allocate(self, size: int) -> int:
        """At least one byte, so that every buffer has an address of its own.

        Raises:
            BackendError: the GPU's memory is full.
        """
        return int(self._call("cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        """Free memory, after waiting for what the GPU is doing."""
        self._runtime.cudaFree(address)  # runs in a finalizer: nobody could handle its error

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        """In the stream's order."""
        self._copy(address, array.ctypes.data, array.nbytes, self._in)

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        """In the stream's order."""
        self._copy(array.ctypes.data, address, array.nbytes, self._out)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        self._call("cudaMemcpyAsync", to, source, size, kind, self.stream)
        self.wait()

    def wait(self) -> None:
        """Wait for all work; an error of anything before shows here."""
        self._call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work as a CUDA graph."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            work()
        except BaseException:
            self._runtime.cudaStreamEndCapture(self.stream)  # its error follows from the first
            raise
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            if not self._call("cudaGraphGetNodes", graph, result=1):
                raise BackendError("CUDA: the graph is empty")
            return CudaGraph(self, self._call("cudaGraphInstantiate", graph, 0))
        finally:
            self._runtime.cudaGraphDestroy(graph)

    def launch(self, graph: Any) -> None:
        """Queue a graph."""
        self._call("cudaGraphLaunch", graph, self.stream)

    def destroy(self, graph: Any) -> None:
        """Give a graph's memory back."""
        self._runtime.cudaGraphExecDestroy(graph)  # runs in a finalizer

    def _call(self, name: str, *arguments: Any, result: int = 0) -> Any:
        """Return the function's result; the bindings return (status, results …)."""
        status, *results = getattr(self._runtime, name)(*arguments)
        if int(status) != 0:
            why = self._runtime.cudaGetErrorString(status)[1]
            raise BackendError(
                f"CUDA: {name} failed: {why.decode() if isinstance(why, bytes) else why}",
                hint=self._hint(int(status)),
            )
        return results[result] if results else None

    def _hint(self, status: int) -> str | None:
        if status == FULL:
            return "give it a smaller --memory-budget, or draw fewer images at a time"
        if status == OLD_DRIVER:
            here = _release(self._runtime.cudaDriverGetVersion()[1])
            wanted = _release(self._runtime.CUDART_VERSION)
            return (
                f"the NVIDIA driver here goes up to CUDA {here}, the Python package cuda-bindings "
                f"is for CUDA {wanted}: update the driver (CUDA 13 needs 580 or newer), or take "
                "the packages for CUDA 12: pip install 'cuda-bindings<13' and tensorrt-rtx-cu12 "
                "or tensorrt-cu12"
            )
        return None


def _release(number: int) -> str:
    """CUDA's version numbers as text: 13050 is 13.5."""
    return f"{number // 1000}.{number % 1000 // 10}"


class CudaGraph:
    """A recorded piece of work; calling it queues it. Its memory goes with the last reference."""

    def __init__(self, cuda: Cuda, graph: Any) -> None:
        self._launch = cuda.launch, graph
        weakref.finalize(self, cuda.destroy, graph).atexit = False

    def __call__(self) -> None:
        """Queue it."""
        launch, graph = self._launch
        launch(graph)


class DeviceBuffer:
    """A tensor on the device. Its memory goes when the last reference to it does."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape = tuple(shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.address = device.allocate(self.nbytes)
        # at exit the process's memory goes anyway, and the library may be gone before
        weakref.finalize(self, device.free, self.address).atexit = False

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize
