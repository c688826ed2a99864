"""The opened engines of one set: verified, timed, run once or in a loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from bifrost_rt import manifest as manifests
from bifrost_rt.backends.base import Backend, Buffer, Engine, output_shape, symbol_sizes
from bifrost_rt.manifest import EngineSpec, Manifest


def verify(folder: Path, manifest: Manifest) -> None:
    """Check every file of the set against its hash, several at once.

    Raises:
        IntegrityError: for the first damaged file.
    """
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        for check in [
            pool.submit(manifests.verify_file, folder, name, file)
            for name, file in manifest.files.items()
        ]:
            check.result()


class Engines:
    """All engines of a set on one backend."""

    def __init__(self, folder: Path, manifest: Manifest, backend: Backend) -> None:
        self.backend = backend
        self._open: dict[str, Engine] = {}
        for spec in manifest.engines:
            self._open[spec.name] = backend.open(folder, spec, manifest.dimensions)

    def spec(self, name: str) -> EngineSpec:
        """What the engine `name` takes and gives."""
        return self._open[name].spec

    def run(
        self, name: str, inputs: Mapping[str, Buffer], timings: dict[str, float]
    ) -> dict[str, Buffer]:
        """Run an engine once, into new buffers; adds its seconds to `timings[name]`."""
        engine = self._open[name]
        outputs = _allocate(self.backend, engine.spec, inputs)
        call = engine.bind(inputs, outputs)
        start = time.perf_counter()
        call()
        timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
        return outputs

    def loop(self, name: str, inputs: Mapping[str, Buffer], timings: dict[str, float]) -> Loop:
        """Prepare an engine for repeated steps."""
        return Loop(self.backend, self._open[name], inputs, timings)

    def close(self) -> None:
        """Close every engine."""
        for engine in self._open.values():
            engine.close()
        self._open.clear()


class Loop:
    """An engine whose outputs become its inputs in the next step.

    Everything is bound before the first step: two calls that read and write two sets of buffers in
    turn. A step is one call, with no allocation, no copy and nothing to upload.
    """

    def __init__(
        self,
        backend: Backend,
        engine: Engine,
        inputs: Mapping[str, Buffer],
        timings: dict[str, float],
    ) -> None:
        carry = engine.spec.carry  # output name -> input name
        ping = {carry[out]: inputs[carry[out]] for out in carry}
        pong = {
            carry[out]: buffer for out, buffer in _allocate(backend, engine.spec, inputs).items()
        }
        fixed = {name: buffer for name, buffer in inputs.items() if name not in ping}
        self._backend = backend
        self._timings = timings
        self._name = engine.spec.name
        self._now, self._next = ping, pong
        self._call = engine.bind({**fixed, **ping}, {o: pong[i] for o, i in carry.items()})
        self._other = engine.bind({**fixed, **pong}, {o: ping[i] for o, i in carry.items()})

    def step(self) -> None:
        """One step."""
        start = time.perf_counter()
        self._call()
        self._timings[self._name] = self._timings.get(self._name, 0.0) + time.perf_counter() - start
        self._call, self._other = self._other, self._call
        self._now, self._next = self._next, self._now

    def __getitem__(self, name: str) -> Buffer:
        """The current buffer of a carried tensor. The step after the next overwrites it."""
        return self._now[name]

    def copy(self, name: str) -> NDArray[Any]:
        """A host copy of a carried tensor, the caller's to keep."""
        return self._backend.download(self._now[name]).copy()

    def replace(self, name: str, array: NDArray[Any]) -> None:
        """Overwrite a carried tensor before the next step."""
        self._backend.write(self._now[name], array)


def _allocate(
    backend: Backend, spec: EngineSpec, inputs: Mapping[str, Buffer]
) -> dict[str, Buffer]:
    sizes = symbol_sizes(spec, inputs)
    return {t.name: backend.empty(output_shape(t, sizes), t.dtype) for t in spec.outputs}
