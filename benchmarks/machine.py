"""The machine that a figure came from. What a machine does not tell is left out, not guessed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from typing import Any

from benchmarks import host, jetson, nvidia
from bifrost_rt import processor

LIBRARIES = (
    *("openvino", "tensorrt-rtx", "tensorrt", "torch", "cuda-bindings"),
    *("nvidia-cuda-runtime", "nvidia-cublas", "nvidia-cudnn-cu13"),
)


def describe() -> dict[str, Any]:
    """Processor, memory, GPU, model and power mode of a Jetson, temperature and versions of the
    libraries."""
    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": nvidia.describe(),
        **jetson.describe(),
        "temperature_c": host.temperature(),
        "libraries": _versions(),
    }
    return {name: value for name, value in found.items() if value}


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> dict[str, Any]:
    here = processor.here()
    found = {
        "name": here.name,
        "cores": cores(),
        "features": [name for name in processor.FEATURES if name in here.features],
        "mhz": _mhz(),
        **host.frequency_rules(),
    }
    return {name: value for name, value in found.items() if value is not None}


def _mhz() -> str | None:
    lines = processor.CPUINFO.read_text().splitlines() if processor.CPUINFO.exists() else ()
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() == "cpu MHz"), None)


def _versions() -> dict[str, str]:
    found = {}
    with contextlib.suppress(ImportError):  # two packages have this module: it knows which it is
        import onnxruntime

        found["onnxruntime"] = onnxruntime.__version__
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
