"""Kernels that TensorRT-RTX compiled on this machine, kept from process to process.

An engine holds kernels as descriptions, which the library compiles for the GPU at hand when a
context is made and when a shape is first seen. All contexts of a backend share one runtime cache,
so that nothing is compiled twice; it is read from the cache folder before the first context is
made, and written there when the last engine is closed. The library itself refuses one that does not
fit.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from bifrost_rt import cache

KIND = "kernels"  # the subfolder

log = logging.getLogger(__name__)


class Kernels:
    """The runtime cache of one backend.

    Args:
        machine: what decides whether kernels fit: GPU, library version, backend version.
    """

    def __init__(self, machine: Sequence[str]) -> None:
        self._key = hashlib.sha256("\n".join(machine).encode()).hexdigest()
        self._cache: Any = None
        self._stored: bytes | None = None

    def use(self, config: Any) -> None:
        """Let the contexts of a runtime configuration share the cache."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            kept = None if cache.off() else cache.read(KIND, self._key)
            if kept is not None and self._cache.deserialize(kept):
                self._stored = kept
        config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write what was compiled since."""
        if self._cache is None or cache.off():
            return
        content = bytes(self._cache.serialize())
        if content == self._stored:
            return
        if reason := cache.write(KIND, self._key, content):
            log.warning("compiled kernels cannot be kept for the next start: %s", reason)
        self._stored = content
