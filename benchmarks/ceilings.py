"""The most that a machine can do: of a GPU from `export.planning.devices`, of a CPU measured.

    python -m benchmarks.ceilings

measures this CPU: the fastest float32 matrix product, and the fastest way to go through memory.
Both are what numpy and its BLAS reach, so an engine that does better shows more than 100 percent.
A process of its own, because BLAS takes its threads from the environment when it is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from export.planning import devices
from export.planning.devices import Device, Figure

# Of the square matrices: small ones find a moment in which nobody else computes, large ones occupy
# many cores.
SIZES = (512, 1024, 2048)
WIDTH = 1024  # of the matrix that is read from memory
LARGE = 256 << 20  # bytes of an array that no cache holds
SECONDS = 0.5  # for each way; the fastest run counts
CACHES = Path("/sys/devices/system/cpu")
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What bounds a machine.

    Attributes:
        device: its figures, with where they come from.
        cache_bytes: what need not come from memory again; None where nothing is known of it.
    """

    device: Device
    cache_bytes: int | None

    def record(self) -> dict[str, Any]:
        """For the record: name, and every figure that time depends on."""
        names = ("bandwidth", *devices.RATES)
        figures = {n: dataclasses.asdict(f) for n, f in self.device.figures.items() if n in names}
        return {"device": self.device.title, "cache_bytes": self.cache_bytes, **figures}


def of_gpu(facts: Mapping[str, Any]) -> Ceilings | None:
    """Return the table's, where it knows the GPU or the Jetson of a `machine.describe()`."""
    gpu = facts.get("gpu", {})
    if "model" in facts:
        device = devices.of_machine(facts["model"], facts["memory_bytes"])
    else:
        mebibytes = gpu.get("memory.total", "").removesuffix(" MiB")
        memory = int(mebibytes) << 20 if mebibytes.isdecimal() else None
        device = devices.of_machine(gpu.get("name", ""), memory)
    return None if device is None else Ceilings(device, 0)  # nothing is known of its cache


def of_cpu(best: Ceilings | None = None) -> Ceilings:
    """Return this machine's CPU, measured now.

    Args:
        best: an earlier measurement; the higher figures are kept, for others may have run then.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ceilings"],
        env={**os.environ, **dict.fromkeys(THREADS, str(machine.cores()))},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    figures = {
        name: Figure(value, f"measured: {source}", "measured")
        for name, (value, source) in found.items()
    }
    for name, earlier in best.device.figures.items() if best else ():
        figures[name] = max(earlier, figures[name], key=lambda figure: figure.value)
    return Ceilings(Device("cpu", "this CPU, measured", 0, figures), last_level_cache())


def last_level_cache(folder: Path = CACHES) -> int | None:
    """Return bytes of all caches of the highest level together, or None where they are not told."""
    sizes: dict[tuple[int, str], int] = {}
    for index in folder.glob("cpu[0-9]*/cache/index*"):
        try:
            level = int((index / "level").read_text())
            shared = (index / "shared_cpu_list").read_text().strip()
            sizes[level, shared] = int((index / "size").read_text().strip().rstrip("K")) << 10
        except (OSError, ValueError):
            continue
    highest = max((level for level, _ in sizes), default=None)
    found = [size for (level, _), size in sizes.items() if level == highest]
    return sum(found) if found else None


def measure() -> dict[str, tuple[float, str]]:
    """`fp32` in 10^12 operations and `bandwidth` in 10^9 bytes a second, with what reached it."""
    rates = {size: _product(size) for size in SIZES}
    size = max(rates, key=lambda size: rates[size])
    count = max(LARGE, 4 * (last_level_cache() or 0)) // 4
    read = np.ones((count // WIDTH, WIDTH), np.float32)
    written, vector = np.empty_like(read), np.ones(WIDTH, np.float32)
    cores = machine.cores()
    with ThreadPoolExecutor(cores) as pool:
        parts = list(zip(np.array_split(written, cores), np.array_split(read, cores), strict=True))

        def copy() -> None:
            list(pool.map(lambda pair: np.copyto(*pair), parts))

        ways = {
            "a copy": 2 * read.nbytes / _fastest(copy),
            "a matrix times a vector": read.nbytes / _fastest(lambda: read @ vector),
        }
    way = max(ways, key=lambda name: ways[name])
    return {
        "fp32": (rates[size] / 1e12, f"numpy, product of two float32 matrices of {size}"),
        "bandwidth": (ways[way] / 1e9, f"numpy, {way}, {read.nbytes >> 20} MiB"),
    }


def _product(size: int) -> float:
    left, right = np.ones((size, size), np.float32), np.ones((size, size), np.float32)
    product = np.empty_like(left)
    return float(2 * size**3 / _fastest(lambda: np.matmul(left, right, out=product)))


def _fastest(call: Callable[[], Any]) -> float:
    fastest, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


if __name__ == "__main__":
    print(json.dumps(measure()))
