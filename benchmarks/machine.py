"""The machine that a figure came from. What a machine does not tell is left out, not guessed."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

# Instruction sets that decide the speed of these networks on a CPU.
CPU_FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx", "tensorrt", "torch")
_NVIDIA = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "power.limit")


def describe() -> dict[str, Any]:
    """Processor, memory, GPU, power mode, temperature and versions of the libraries."""
    found = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": _cpu(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": _gpu(),
        "power_mode": _output("nvpmodel", "-q"),  # Jetson
        "temperature_c": temperature(),
        "libraries": _versions(),
    }
    return {name: value for name, value in found.items() if value}


def temperature() -> float | None:
    """The hottest thermal zone, in degrees Celsius."""
    readings = []
    for path in Path("/sys/class/thermal").glob("thermal_zone*/temp"):
        try:
            readings.append(int(path.read_text()) / 1000)
        except (OSError, ValueError):  # a zone that is switched off
            continue
    return max(readings, default=None)


def _cpu() -> dict[str, Any]:
    fields: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "name": fields.get("model name", platform.processor() or platform.machine()),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "features": [name for name in CPU_FEATURES if name in flags],
        "mhz": fields.get("cpu MHz"),
    }


def _gpu() -> dict[str, str] | None:
    line = _output("nvidia-smi", f"--query-gpu={','.join(_NVIDIA)}", "--format=csv,noheader")
    if not line:
        return None
    return dict(
        zip(_NVIDIA, (part.strip() for part in line.splitlines()[0].split(",")), strict=False)
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
