"""A candidate in a process of its own, so that loading, cold start and peak memory are its alone,
and the parent can let several draw in turn."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import candidates
from benchmarks.candidates import Spec
from benchmarks.metering import Meter
from benchmarks.peak_memory import peak_bytes
from bifrost_rt.errors import BifrostError, EngineSetError


@dataclass(frozen=True)
class First:
    """The first image of a process.

    Attributes:
        pixels: uint8 [n, H, W, 3].
        timings: seconds per part.
        cpu_seconds: of all threads from the start of the process to the image, imports included.
        engines_cpu_seconds: of these, opening and running engines; None where there are none.
    """

    pixels: NDArray[np.uint8]
    timings: dict[str, float]
    cpu_seconds: float
    engines_cpu_seconds: float | None


class Remote:
    """Starts the process and waits until its candidate is loaded.

    Raises:
        EngineSetError: it could not be loaded; with the message of the process.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(spec, theirs), daemon=True)
        start = time.perf_counter()
        self._process.start()
        theirs.close()
        self.load_seconds = float(self._receive())
        self.start_seconds = time.perf_counter() - start

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def first(self, request: dict[str, Any]) -> First:
        """Draw the process's first image."""
        self._pipe.send(("first", request))
        first: First = self._receive()
        return first

    def image(self, request: dict[str, Any]) -> dict[str, float]:
        """Draw a request and return the seconds of its parts."""
        self._pipe.send(("image", request))
        timings: dict[str, float] = self._receive()
        return timings

    def close(self) -> int:
        """End the process and return its peak memory in bytes."""
        self._pipe.send(("end", None))
        peak = int(self._receive())
        self._process.join()
        return peak

    def end(self) -> None:
        """End the process, whatever it does; nothing where it has ended."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise EngineSetError(
                f"{self.spec.name}: the process ended with status {self._process.exitcode}",
                hint="out of memory is the usual cause",
            ) from None
        if kind == "error":
            self.end()
            raise EngineSetError(f"{self.spec.name}: {value}")
        return value


def _serve(spec: Spec, pipe: Connection) -> None:
    try:
        meter = Meter()
        start = time.perf_counter()
        candidate = candidates.load(spec, meter)
        pipe.send(("ok", time.perf_counter() - start))
        while True:
            asked, request = pipe.recv()
            if asked == "end":
                break
            pixels, timings = candidate.draw(request)
            if asked == "first":
                engines = meter.cpu_seconds if spec.runs_the_set else None
                meter.stop()
                pipe.send(("ok", First(pixels, timings, time.process_time(), engines)))
            else:
                pipe.send(("ok", timings))
        pipe.send(("ok", peak_bytes()))
    except BifrostError as error:
        pipe.send(("error", str(error)))
