"""What the text engines gave for a prompt, kept for the prompt that comes again.

Outputs are found by the very values that an engine was given, so what comes back is what the engine
would compute again, bit for bit. They lie in the host's memory.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A prompt of the release takes some 220 MiB: keys and values, and 28 rows of modulation.
MOST = 256 << 20
SHARE = 16  # of a memory budget, at most one part in so many

Outputs = Mapping[str, NDArray[Any]]


def default_bytes(budget: int | None) -> int:
    """Return what may be kept where nobody said it.

    Args:
        budget: bytes that the engines may take; None: no limit.
    """
    return MOST if budget is None else min(MOST, budget // SHARE)


def key(engine: str, inputs: Mapping[str, NDArray[Any]]) -> bytes:
    """Return what tells a call from every other: the engine, and the values that it is given or
    that its inputs were computed from."""
    digest = hashlib.sha256(engine.encode())
    for name in sorted(inputs):
        array = np.ascontiguousarray(inputs[name])
        digest.update(f"\0{name} {array.dtype} {array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.digest()


class PromptCache:
    """Outputs of text engines; the one that was not asked for longest goes first.

    Args:
        capacity: bytes that may be kept.

    Attributes:
        room: bytes that may be kept now: all of `capacity`, or fewer while engines need the memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = self.room = capacity
        self._entries: OrderedDict[bytes, dict[str, NDArray[Any]]] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes that are kept now."""
        return sum(_bytes(outputs) for outputs in self._entries.values())

    def get(self, key: bytes) -> Outputs | None:
        """Return the outputs, which nobody may change; None where they are not kept."""
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def keep(self, key: bytes, outputs: Outputs) -> None:
        """Keep a copy, if there is room for it and every value is finite."""
        if _bytes(outputs) > self.room or not all(map(_finite, outputs.values())):
            return
        self._entries.pop(key, None)
        self._shrink(self.room - _bytes(outputs))
        self._entries[key] = {name: array.copy() for name, array in outputs.items()}

    def limit(self, room: int) -> None:
        """Keep no more than `room` bytes from now on."""
        self.room = room
        self._shrink(room)

    def _shrink(self, to: int) -> None:
        while self._entries and self.size > to:
            self._entries.popitem(last=False)


def _bytes(outputs: Outputs) -> int:
    return sum(array.nbytes for array in outputs.values())


def _finite(array: NDArray[Any]) -> bool:
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())
