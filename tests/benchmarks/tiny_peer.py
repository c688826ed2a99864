"""A peer that needs nothing but numpy."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.protocol import serve


class Product:
    def __init__(self, settings: Mapping[str, Any]) -> None:
        if settings.get("missing"):
            raise RuntimeError("libmissing.so: cannot open shared object file")
        self._matrix = np.arange(12.0, dtype=np.float32).reshape(3, 4) * settings["scale"]
        self._settings = settings
        self.about = {"threads": settings["threads"], "libraries": {"numpy": np.__version__}}
        print("a library prints what it likes")

    def run(self) -> dict[str, float]:
        print("and so it does when it works")
        if self._settings.get("dies"):
            print("out of luck", file=sys.stderr)
            sys.stderr.flush()
            import os

            os._exit(3)
        start = time.perf_counter()
        self._matrix @ self._matrix.T
        step = time.perf_counter() - start
        return {"step": step, "other": 2 * step}

    def output(self) -> NDArray[Any]:
        return self._matrix[: self._settings.get("rows", 3)]


if __name__ == "__main__":
    serve(Product)
