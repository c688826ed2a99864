"""The seam between schedule and arithmetic: what a backend must do, and no more.

A backend opens a file, hands out buffers in its own memory, binds named buffers into a call that
can be repeated, and closes. The contract tests run against every backend and against the double
that export uses to compare an engine with torch.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bifrost_rt import dims, memory_plan
from bifrost_rt.errors import EngineInputError
from bifrost_rt.manifest import EngineSpec, Range, TensorSpec


class Buffer(Protocol):
    """A tensor in a backend's memory; a numpy array where that is host memory."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""


class Engine(Protocol):
    """One opened graph."""

    spec: EngineSpec

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return a call on fixed buffers. Running it again reads and writes the same memory and
        allocates nothing that the backend does not force.

        Raises:
            EngineInputError: a name, dtype or shape that does not fit the engine.
        """

    def close(self) -> None:
        """Free the engine's memory. The engine cannot be used afterwards."""


class Backend(Protocol):
    """One backend."""

    name: str

    @property
    def opens_in_threads(self) -> bool:
        """Whether an engine may be opened in another thread, beside others and while one runs.
        Where not, generators that were given the same backend take turns."""

    def open(self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]) -> Engine:
        """Load one engine of the set in `folder`."""

    def free_memory(self) -> int | None:
        """Return bytes that the device has free, where it says so; the default budget is a little
        less."""

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """Return bytes that an opened engine holds whose files have `stored` bytes, at their
        highest: backends unpack and reorder weights, and some keep the file's pages beside that."""

    scratch_share: float
    """What the backend takes of the scratch memory that a manifest states, which is counted for one
    that keeps the scores of attention in memory."""

    in_host_memory: bool
    """Whether what it takes is the machine's memory, not that of a device alone."""

    writes_in_place: bool
    """Whether a tensor that an engine continues, such as a K/V cache, may be bound as its input and
    its output at once."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """Uninitialised memory of the device."""

    def upload(self, array: NDArray[Any]) -> Buffer:
        """Host to device. May share the array's memory: do not change it afterwards."""

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Overwrite a buffer with a host array of its shape and dtype."""

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """Device to host. May share the buffer's memory: copy what must outlive it."""

    def wait(self) -> None:
        """Until all calls are done. A loop's step may be queued alone; what reads a buffer waits by
        itself."""


class HostMemory:
    """Buffers of a backend whose device is the host: numpy arrays, never copied."""

    opens_in_threads = True
    scratch_share = 1.0
    in_host_memory = True
    writes_in_place = True

    def free_memory(self) -> int | None:
        """Return what the machine can give without swapping."""
        return memory_plan.host_memory()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Host memory."""
        return np.empty(shape, dtype)

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        """Return the array itself, contiguous."""
        return np.ascontiguousarray(array)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Copy an array over a buffer."""
        np.copyto(np.asarray(buffer), array)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """Return the buffer itself."""
        return np.asarray(buffer)

    def wait(self) -> None:
        """Do nothing: calls return when they are done."""


def return_freed_memory() -> None:
    """Hand what the process has freed back to the system: the C library keeps it, up to the whole
    of an engine's weights. Without effect where that library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def check_bindings(
    spec: EngineSpec,
    dimensions: Mapping[str, Range],
    inputs: Mapping[str, Buffer],
    outputs: Mapping[str, Buffer],
) -> None:
    """Names, then dtype, then shape, each with its own message.

    Raises:
        EngineInputError: for the first tensor that does not fit.
    """
    sizes = symbol_sizes(spec, inputs)
    for kind, tensors, given in (("input", spec.inputs, inputs), ("output", spec.outputs, outputs)):
        expected = {t.name for t in tensors}
        if missing := sorted(expected - given.keys()):
            raise EngineInputError(f"engine `{spec.name}`: missing {kind} {', '.join(missing)}")
        if unknown := sorted(given.keys() - expected):
            raise EngineInputError(f"engine `{spec.name}`: unknown {kind} {', '.join(unknown)}")
        for tensor in tensors:
            _check_tensor(spec.name, kind, tensor, dimensions, given[tensor.name], sizes)


def _check_tensor(
    engine: str,
    kind: str,
    tensor: TensorSpec,
    dimensions: Mapping[str, Range],
    found: Buffer,
    sizes: dict[str, int],
) -> None:
    where = f"engine `{engine}`, {kind} `{tensor.name}`"
    got = f"{found.dtype}{list(found.shape)}"
    if found.dtype != np.dtype(tensor.dtype):
        raise EngineInputError(f"{where}: expected {tensor}, got {got}")
    if len(found.shape) != len(tensor.shape):
        raise EngineInputError(f"{where}: expected {tensor}, got {got}")
    for axis, (symbol, size) in enumerate(zip(tensor.shape, found.shape, strict=True)):
        alone = isinstance(symbol, str) and symbol.isidentifier()
        want = sizes.setdefault(str(symbol), size) if alone else dims.evaluate(symbol, sizes)
        if size != want:
            raise EngineInputError(
                f"{where}: expected {tensor}, got {got}: dimension {axis} must be {want}"
            )
        if alone:
            bounds = dimensions[str(symbol)]
            if size < bounds.min or (bounds.max is not None and size > bounds.max):
                raise EngineInputError(
                    f"{where}: expected {tensor} with {bounds.min} <= {symbol} <= {bounds.max}, "
                    f"got {got}",
                    hint="rebuild the set for this size with `python -m export.build`",
                )


def output_shape(tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a spec's shape with every symbol replaced by its size."""
    return dims.shape_at(tensor.shape, sizes)


def symbol_sizes(spec: EngineSpec, inputs: Mapping[str, Buffer]) -> dict[str, int]:
    """Return which size each symbol has, read from the inputs that are there: from the first that
    has it alone in a dimension."""
    sizes: dict[str, int] = {}
    for tensor in spec.inputs:
        if tensor.name in inputs:
            for symbol, size in zip(tensor.shape, inputs[tensor.name].shape, strict=False):
                if isinstance(symbol, str) and symbol.isidentifier():
                    sizes.setdefault(symbol, size)
    return sizes
