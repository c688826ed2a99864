"""TensorRT without a GPU: the library's names and rules over host memory.

Its engines are files that name an ONNX graph, which onnxruntime computes, so the driver can be held
to real values. It is strict where a GPU would crash or read rubbish: an address that was never
allocated or was freed, a block too small for its tensor, an input without a shape.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

MAGIC = b"double\n"


def write_engine(path: Path, graph: Path, inputs: list[str], outputs: list[str]) -> None:
    about = {"graph": str(graph), "inputs": inputs, "outputs": outputs}
    path.write_bytes(MAGIC + json.dumps(about).encode())


class HostDevice:
    """`bifrost_rt.backends.cuda.Device` in host memory."""

    stream = 7

    def __init__(self) -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.waits = 0

    def allocate(self, size: int) -> int:
        block = np.full(max(size, 1), 0xA5, np.uint8)
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        del self.blocks[address]

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        self.view(address, array.shape, array.dtype)[...] = array

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        array[...] = self.view(address, array.shape, array.dtype)

    def free_bytes(self) -> int:
        return 1 << 34

    def wait(self) -> None:
        self.waits += 1

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        block = self.blocks[address]  # KeyError: never allocated, or freed
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert size <= block.nbytes, "past the end of its memory"
        return block[:size].view(dtype).reshape(shape)


class Log:
    def __init__(self) -> None:
        self.errors: list[str] = []

    def take(self) -> list[str]:
        errors, self.errors = self.errors, []
        return errors


class Context:
    def __init__(self, library: Library, about: dict[str, Any]) -> None:
        self._library, self._about = library, about
        self._session = ort.InferenceSession(about["graph"], providers=["CPUExecutionProvider"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.calls: list[str] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self._about["inputs"]
        self.calls.append(f"shape {name}")
        self.shapes[name] = tuple(shape)
        return self._library.accepts

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.calls.append(f"address {name}")
        self.addresses[name] = memory
        return self._library.accepts

    def execute_async_v3(self, stream_handle: int) -> bool:
        device = self._library.device
        assert stream_handle == device.stream
        if not self._library.runs:
            self._library.logger.errors.append("IExecutionContext::enqueueV3: Error Code 1: …")
            return False
        kinds = {
            "tensor(float)": np.float32,
            "tensor(int64)": np.int64,
            "tensor(bool)": np.bool_,
            "tensor(uint8)": np.uint8,
        }
        feed = {
            i.name: device.view(self.addresses[i.name], self.shapes[i.name], kinds[i.type]).copy()
            for i in self._session.get_inputs()
        }
        names = self._about["outputs"]
        for name, array in zip(names, self._session.run(names, feed), strict=True):
            device.view(self.addresses[name], array.shape, array.dtype)[...] = array
        return True


class Engine:
    def __init__(self, library: Library, about: dict[str, Any]) -> None:
        self._library, self._about = library, about
        self._names = [*about["inputs"], *about["outputs"]]
        self.num_io_tensors = len(self._names)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_location(self, name: str) -> str:
        return "host" if name in self._library.on_host else "device"

    def create_execution_context(self) -> Context | None:
        if self._library.full:
            self._library.logger.errors.append("OutOfMemory (Requested size was 4 bytes.)")
            return None
        self._library.contexts.append(Context(self._library, self._about))
        return self._library.contexts[-1]


class Runtime:
    def __init__(self, logger: Log, library: Library) -> None:
        self._logger, self._library = logger, library

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Engine | None:
        data = bytes(serialized_engine)
        if not data.startswith(MAGIC) or not data.endswith(b"}"):
            self._logger.errors += ["Serialization assertion failed", "and what follows from it"]
            return None
        return Engine(self._library, json.loads(data[len(MAGIC) :]))


class Library:
    """Stands in for the module `tensorrt_rtx`."""

    __version__ = "1.7.1.116"
    TensorLocation = SimpleNamespace(DEVICE="device", HOST="host")

    def __init__(self, device: HostDevice) -> None:
        self.device, self.logger = device, Log()
        self.contexts: list[Context] = []
        self.on_host: tuple[str, ...] = ()
        self.accepts = self.runs = True
        self.full = False

    def Runtime(self, logger: Log) -> Runtime:
        return Runtime(logger, self)
