"""The machine that a figure came from. What a machine does not tell is left out, not guessed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from benchmarks import host, jetson, nvidia
from bifrost_rt.backends.choice import processor_features

# Instruction sets that decide the speed of these networks on a CPU.
CPU_FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx", "tensorrt", "torch")


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
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = processor_features()
    found = {
        "name": fields.get("model name", platform.processor() or platform.machine()),
        "cores": cores(),
        "features": [name for name in CPU_FEATURES if name in flags],
        "mhz": fields.get("cpu MHz"),
        **host.frequency_rules(),
    }
    return {name: value for name, value in found.items() if value is not None}


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
