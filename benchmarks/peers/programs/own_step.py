"""Our denoising step, with its share of what is computed once for all steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.peers import flux_files, model_files
from benchmarks.peers.protocol import serve
from benchmarks.peers.stock_files import INPUTS
from bifrost_rt import backends
from bifrost_rt.backends.base import output_shape
from bifrost_rt.manifest import EngineSpec, Range


class OwnStep:
    """Args:
    settings: `folder`, `form` and `backend` of the engine.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        folder = Path(settings["folder"])
        self._backend = backends.load(settings["backend"])
        self._inputs: Mapping[str, NDArray[Any]] = dict(np.load(folder / INPUTS))
        engines = model_files.read(folder)
        self._once, _ = self._bound(folder, engines[flux_files.CONDITIONING])
        self._step, self._results = self._bound(folder, engines[settings["form"]])
        precision = engines[settings["form"]].precision
        self.about = {
            "weights": precision.layers or precision.weights,
            "libraries": machine.describe()["libraries"],
        }

    def _bound(self, folder: Path, spec: EngineSpec) -> tuple[Callable[[], None], dict[str, Any]]:
        backend, sizes = self._backend, flux_files.sizes()
        engine = backend.open(folder, spec, {name: Range(1, n) for name, n in sizes.items()})
        given = {t.name: backend.upload(self._inputs[t.name]) for t in spec.inputs}
        results = {t.name: backend.empty(output_shape(t, sizes), t.dtype) for t in spec.outputs}
        return engine.bind(given, results), results

    def run(self) -> dict[str, float]:
        """Compute a step, and its share of the modulation of all steps."""
        start = time.perf_counter()
        self._once()
        between = time.perf_counter()
        self._step()
        end = time.perf_counter()
        return {"step": end - between + (between - start) / flux_files.STEPS}

    def output(self) -> NDArray[Any]:
        """Compute the velocity [1, S, C]."""
        self._step()
        return np.array(self._backend.download(self._results["next_velocity"]))


if __name__ == "__main__":
    serve(OwnStep)
