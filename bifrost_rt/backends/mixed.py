"""A set on several backends, such as text encoders on the host beside a GPU that draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import DTypeLike, NDArray

from bifrost_rt.backends.base import Backend, Buffer, Engine, HostMemory
from bifrost_rt.manifest import EngineSpec, Range


class Mixed:
    """The backend of a set, beside which some engines have one of their own.

    All buffers are the set's backend's. An engine that computes elsewhere gets copies of its inputs
    and hands back copies of its outputs at every call, unless both work in host memory; so it is
    for engines that run once an image, and costs a loop its copies at every step.

    Args:
        main: the set's backend.
        own: engine -> its own backend.
    """

    def __init__(self, main: Backend, own: Mapping[str, Backend]) -> None:
        self.name = main.name
        self.scratch_share = max(b.scratch_share for b in (main, *own.values()))
        self.writes_in_place = all(b.writes_in_place for b in (main, *own.values()))
        self.in_host_memory = main.in_host_memory
        self._main, self._own = main, dict(own)

    @property
    def opens_in_threads(self) -> bool:
        """Whether all of them do."""
        return all(backend.opens_in_threads for backend in (self._main, *self._own.values()))

    def open(self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]) -> Engine:
        """Load an engine on its backend."""
        backend = self._own.get(spec.name, self._main)
        engine = backend.open(folder, spec, dimensions)
        if backend is self._main or all(isinstance(b, HostMemory) for b in (backend, self._main)):
            return engine
        return EngineElsewhere(engine, backend, self._main)

    def free_memory(self) -> int | None:
        """Ask the set's backend."""
        return self._main.free_memory()

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """Ask the engine's backend; nothing where it takes other memory than the set's."""
        backend = self._own.get(spec.name, self._main)
        if backend.in_host_memory != self._main.in_host_memory:
            return 0
        return backend.weights_in_memory(spec, stored)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """Take memory of the set's backend."""
        return self._main.empty(shape, dtype)

    def upload(self, array: NDArray[Any]) -> Buffer:
        """Upload to the set's backend."""
        return self._main.upload(array)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Overwrite a buffer of the set's backend."""
        self._main.write(buffer, array)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """Download from the set's backend."""
        return self._main.download(buffer)

    def wait(self) -> None:
        """Wait for the set's backend: calls of other backends have ended when they return."""
        self._main.wait()


class EngineElsewhere:
    """An engine whose inputs and outputs are in another backend's memory.

    Args:
        engine: opened on `backend`.
        main: whose buffers are bound.
    """

    def __init__(self, engine: Engine, backend: Backend, main: Backend) -> None:
        self.spec = engine.spec
        self._engine, self._backend, self._main = engine, backend, main

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Bind a call that copies the inputs over, computes, and copies the outputs back."""
        backend, main = self._backend, self._main
        here, made = (
            {name: backend.empty(buffer.shape, buffer.dtype) for name, buffer in side.items()}
            for side in (inputs, outputs)
        )
        compute = self._engine.bind(here, made)

        def call() -> None:
            for name, buffer in here.items():
                backend.write(buffer, main.download(inputs[name]))
            compute()
            backend.wait()
            for name, buffer in made.items():
                main.write(outputs[name], backend.download(buffer))

        return call

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()
