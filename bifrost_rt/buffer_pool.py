"""Buffers and bound calls that stay from image to image.

Where the sizes are the same, so are the addresses: nothing is allocated, nothing is bound, and what
a driver recorded for a call, such as a CUDA graph, is replayed for the next image too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bifrost_rt.backends.base import Backend, Buffer, Engine


class BufferPool:
    """The buffers of one set of engines, by name.

    Attributes:
        keep: whether buffers stay. Where memory is short they go when their engine is done, and
            every run gets new ones.
    """

    def __init__(self, backend: Backend) -> None:
        self.keep = True
        self._backend = backend
        self._buffers: dict[str, Buffer] = {}
        self._calls: dict[tuple[int, ...], Callable[[], None]] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """Return the buffer called `name`; what an earlier image left there is still in it."""
        kept = self._buffers.get(name)
        if kept is not None and kept.shape == shape and kept.dtype == np.dtype(dtype):
            return kept
        if kept is not None:
            # first what holds it, then the buffer: the old and the new one are never both there
            gone = id(kept)
            self._calls = {key: call for key, call in self._calls.items() if gone not in key}
            del self._buffers[name], kept
        made = self._backend.empty(shape, dtype)
        if self.keep:
            self._buffers[name] = made
        return made

    def put(self, name: str, array: NDArray[Any], *, lent: bool = False) -> Buffer:
        """Return a host array in the buffer called `name`.

        Args:
            lent: the buffer must not share the array's memory.
        """
        if not self.keep:
            return self._backend.upload(array.copy() if lent else array)
        buffer = self.empty(name, array.shape, array.dtype)
        self._backend.write(buffer, array)
        return buffer

    def bind(
        self, engine: Engine, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return the engine on these buffers; bound before, if all of them are kept here.

        Raises:
            EngineInputError: a name, dtype or shape that does not fit the engine.
        """
        kept = {id(buffer) for buffer in self._buffers.values()}
        key = (id(engine), *(id(side[name]) for side in (inputs, outputs) for name in sorted(side)))
        if not kept.issuperset(key[1:]):
            return engine.bind(inputs, outputs)
        if key not in self._calls:
            self._calls[key] = engine.bind(inputs, outputs)
        return self._calls[key]

    def forget(self, engine: Engine) -> None:
        """Let go of the calls of an engine that leaves: they hold on to it."""
        gone = id(engine)
        self._calls = {key: call for key, call in self._calls.items() if key[0] != gone}

    def clear(self) -> None:
        """Let go of everything."""
        self._calls.clear()
        self._buffers.clear()
