"""TensorRT without a GPU: the library's names and rules over host memory.

Its engines are files that name an ONNX graph, which onnxruntime computes, so the backend can be
held to real values. It is strict where a GPU would crash or read rubbish: an address that was never
allocated or was freed, a block too small for its tensor, an input without a shape, a graph that is
replayed after its context was changed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bifrost_rt import manifest
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import Compiled
from export.engine_set import describe_files

MAGIC = b"double\n"
SCRATCH = 1000


def write_engine(path: Path, graph: Path, inputs: list[str], outputs: list[str]) -> None:
    about = {"graph": str(graph), "inputs": inputs, "outputs": outputs}
    path.write_bytes(MAGIC + json.dumps(about).encode())


def write_set(source: Path, folder: Path, compiled: Compiled, on_cpu: Sequence[str] = ()) -> Path:
    """Write a set as if compiled: its engines are the double's, those `on_cpu` stay ONNX graphs."""
    folder.mkdir()
    (folder / "tokenizers").symlink_to(source / "tokenizers")
    facts = manifest.read(source)
    engines = []
    for spec in facts.engines:
        if spec.name in on_cpu:
            for file in spec.files:
                shutil.copyfile(source / file, folder / file)
            engines.append(dataclasses.replace(spec, backend="onnxruntime"))
            continue
        name = f"{spec.name}.engine"
        names = [[t.name for t in side] for side in (spec.inputs, spec.outputs)]
        write_engine(folder / name, source / spec.graph, *names)
        engines.append(dataclasses.replace(spec, graph=name, files=(name,), compiled=compiled))
    made = dataclasses.replace(
        facts, backend="tensorrt-rtx", engines=tuple(engines), files=describe_files(folder)
    )
    (folder / manifest.FILENAME).write_bytes(made.dumps())
    return folder


class HostDevice:
    """`bifrost_rt.backends.cuda.Device` in host memory."""

    stream = 7
    unified = False

    def __init__(self) -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.waits = self.captures = self.launches = 0
        self.recording: list[Callable[[], None]] | None = None
        self.drops = False  # whether recording loses everything
        self.spoils: Callable[[], None] | None = None  # runs after each replay

    def allocate(self, size: int) -> int:
        block = np.full(max(size, 1), 0xA5, np.uint8)
        self.blocks[block.ctypes.data] = block
        return int(block.ctypes.data)

    def free(self, address: int) -> None:
        del self.blocks[address]

    def copy_in(self, address: int, array: NDArray[Any]) -> None:
        self.view(address, array.shape, array.dtype)[...] = array
        self.wait()

    def copy_out(self, array: NDArray[Any], address: int) -> None:
        self.wait()
        array[...] = self.view(address, array.shape, array.dtype)

    def free_bytes(self) -> int:
        return 1 << 34

    def wait(self) -> None:
        assert self.recording is None, "a stream that is being recorded cannot be waited for"
        self.waits += 1

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        self.recording = []
        try:
            work()
            recorded = [] if self.drops else self.recording
        finally:
            self.recording = None
        if not recorded:
            raise BackendError("CUDA: the graph is empty")

        def launch() -> None:
            self.launches += 1
            for one in recorded:
                one()
            if self.spoils is not None:
                self.spoils()

        return launch

    def view(self, address: int, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        block = self.blocks[address]  # KeyError: never allocated, or freed
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert size <= block.nbytes, "past the end of its memory"
        return block[:size].view(dtype).reshape(shape)


class Log:
    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def take_warnings(self) -> list[str]:
        warnings, self.warnings = self.warnings, []
        return warnings

    def take(self) -> list[str]:
        errors, self.errors = self.errors, []
        return errors


class Context:
    def __init__(self, library: Library, about: dict[str, Any], graph: bool = False) -> None:
        self._library, self._about, self._graph = library, about, graph
        self._session = ort.InferenceSession(about["graph"], providers=["CPUExecutionProvider"])
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.calls: list[str] = []
        self._scratch = 0
        self._changes = 0
        self._recorded, self._runs = -1, 0

    @property
    def graph(self) -> bool:
        return self._graph

    @property
    def file(self) -> str:
        return str(self._about["graph"])

    def set_device_memory(self, memory: int, size: int) -> None:
        assert self._library.device.blocks[memory].nbytes >= size >= SCRATCH
        self._scratch = memory

    def is_stream_capturable(self, stream: int) -> bool:
        return self._library.capturable

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name in self._about["inputs"]
        self.calls.append(f"shape {name}")
        self.shapes[name] = tuple(shape)
        self._changes += 1
        return self._library.accepts

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.calls.append(f"address {name}")
        self.addresses[name] = memory
        self._changes += 1
        return self._library.accepts

    def execute_async_v3(self, stream_handle: int) -> bool:
        device = self._library.device
        assert stream_handle == device.stream
        assert self._scratch in device.blocks
        if not self._library.runs:
            self._library.logger.errors.append("IExecutionContext::enqueueV3: Error Code 1: …")
            return False
        if device.recording is None:
            self._run()
            if self._graph:
                self._replayed(device)
            return True
        recorded, shapes, addresses = self._changes, dict(self.shapes), dict(self.addresses)

        def replay() -> None:
            assert self._changes == recorded, "the context was changed since"
            assert (self.shapes, self.addresses) == (shapes, addresses)
            self._run()

        device.recording.append(replay)
        return True

    def _replayed(self, device: HostDevice) -> None:
        """The library's own graphs: set up, recorded, and from the third run on replayed."""
        if self._changes != self._recorded:
            self._recorded, self._runs = self._changes, 0
        self._runs += 1
        if self._runs == 2 and self._library.warns:
            self._library.logger.warnings += ["Unrelated.", self._library.warns]
        if self._runs > 2:
            if device.spoils is not None:
                device.spoils()
            if self._library.faulty(self):
                address = self.addresses[self._about["outputs"][0]]
                device.blocks[address][:4] ^= 0x55

    def _run(self) -> None:
        device = self._library.device
        feed = {
            i.name: device.view(
                self.addresses[i.name], self.shapes.get(i.name, tuple(i.shape)), KINDS[i.type]
            ).copy()
            for i in self._session.get_inputs()
        }
        names = self._about["outputs"]
        for name, array in zip(names, self._session.run(names, feed), strict=True):
            device.view(self.addresses[name], array.shape, array.dtype)[...] = array


KINDS = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


class RuntimeCache:
    """Holds the names of the graphs that a context was made of."""

    def __init__(self, version: str) -> None:
        self._version = version
        self.kernels: set[str] = set()

    def deserialize(self, blob: bytes) -> bool:
        version, *kernels = bytes(blob).decode().split("\n")
        if version != self._version:
            return False
        self.kernels = set(kernels)
        return True

    def serialize(self) -> memoryview:
        return memoryview("\n".join((self._version, *sorted(self.kernels))).encode())


class RuntimeConfig:
    def __init__(self, library: Library) -> None:
        self._library = library
        self.cache: RuntimeCache | None = None

    def create_runtime_cache(self) -> RuntimeCache:
        self._library.caches.append(RuntimeCache(self._library.__version__))
        return self._library.caches[-1]

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True

    cuda_graph_strategy = "none"
    dynamic_shapes_kernel_specialization_strategy = "lazy"
    strategy = "static"

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy


class Engine:
    def __init__(self, library: Library, about: dict[str, Any]) -> None:
        self._library, self._about = library, about
        self._names = [*about["inputs"], *about["outputs"]]
        self.num_io_tensors = len(self._names)
        self.device_memory_size_v2 = SCRATCH

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_location(self, name: str) -> str:
        return "host" if name in self._library.on_host else "device"

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig(self._library)

    def create_execution_context(self, runtime_config: Any) -> Context | None:
        graph = False
        if isinstance(runtime_config, RuntimeConfig):
            graph = runtime_config.cuda_graph_strategy == "whole"
            assert runtime_config.dynamic_shapes_kernel_specialization_strategy == "eager"
            assert runtime_config.cache is not None
            kernels, name = runtime_config.cache.kernels, Path(self._about["graph"]).stem
            if name not in kernels:
                self._library.compiled.append(name)
                kernels.add(name)
            runtime_config = runtime_config.strategy
        assert runtime_config == "user"
        if self._library.full:
            self._library.logger.errors.append("OutOfMemory (Requested size was 4 bytes.)")
            return None
        self._library.contexts.append(Context(self._library, self._about, graph))
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
    """Stands in for the module `tensorrt_rtx`; without `graphs` for `tensorrt`."""

    __version__ = "1.7.1.116"
    TensorLocation = SimpleNamespace(DEVICE="device", HOST="host")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")

    def __init__(self, device: HostDevice, graphs: bool = True) -> None:
        self.device, self.logger = device, Log()
        if graphs:
            self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")
        self.capturable = True
        self.contexts: list[Context] = []
        self.caches: list[RuntimeCache] = []
        self.compiled: list[str] = []  # graphs whose kernels were in no cache
        self.on_host: tuple[str, ...] = ()
        self.accepts = self.runs = True
        self.full = False
        self.warns = ""  # when the library's own graphs are recorded
        self.faulty: Callable[[Context], bool] = lambda context: False  # whose replays go wrong

    def Runtime(self, logger: Log) -> Runtime:
        return Runtime(logger, self)
