"""How much of a cold start is the engines': CPU seconds inside a backend, counted from outside.

Counting costs two system calls for each call of an engine, so it ends with the first image; what is
left then of a call that was made before is one question to this file.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bifrost_rt.backends.base import Backend, Buffer, Engine
from bifrost_rt.manifest import EngineSpec, Range


class Meter:
    """CPU seconds of this process, all its threads, while at least one watched call is under way:
    engines that open side by side count once."""

    def __init__(self) -> None:
        self.cpu_seconds = 0.0
        self._counting = True
        self._lock = threading.Lock()
        self._under_way = 0
        self._since = 0.0

    def watch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same call, counted; the call itself once the meter has stopped."""
        if not self._counting:
            return call

        def watched(*arguments: Any, **named: Any) -> Any:
            if not self._counting:
                return call(*arguments, **named)
            self._enter()
            try:
                return call(*arguments, **named)
            finally:
                self._leave()

        return watched

    def _enter(self) -> None:
        with self._lock:
            if self._under_way == 0:
                self._since = time.process_time()
            self._under_way += 1

    def _leave(self) -> None:
        with self._lock:
            self._under_way -= 1
            if self._under_way == 0:
                self.cpu_seconds += time.process_time() - self._since

    def stop(self) -> None:
        """Watch nothing from now on."""
        self._counting = False


class MeteredBackend:
    """A backend whose engines are counted while they open and run; everything else is its own."""

    def __init__(self, backend: Backend, meter: Meter) -> None:
        self._backend, self._meter = backend, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def open(
        self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]
    ) -> MeteredEngine:
        """Load one engine."""
        opened = self._meter.watch(self._backend.open)(folder, spec, dimensions)
        return MeteredEngine(opened, self._meter)

    def wait(self) -> None:
        """Until all calls are done: a queued step is computed here."""
        self._meter.watch(self._backend.wait)()


class MeteredEngine:
    """One engine of a metered backend."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine, self._meter = engine, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return a call on these buffers."""
        return self._meter.watch(self._engine.bind(inputs, outputs))
