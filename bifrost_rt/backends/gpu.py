"""Which NVIDIA GPU this machine has, asked of its driver alone; or the reason why there is none.

The driver library comes with every working installation, so this needs no package, and an answer
costs milliseconds: `doctor` asks, and so does every driver that computes on a GPU.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_NO_DEVICE = 100
_OK = 0
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_NAME_BYTES = 256


@dataclass(frozen=True)
class Gpu:
    """The first GPU that the process may use."""

    name: str
    architecture: str  # "sm89"


def find(load: Callable[[str], Any] = ctypes.CDLL) -> Gpu | str:
    """Return the GPU, or the reason why there is none.

    Args:
        load: opens a shared library; a test passes its own.
    """
    try:
        driver = load(LIBRARY)
    except OSError:
        return f"there is no NVIDIA driver ({LIBRARY} was not found)"
    if code := driver.cuInit(0):
        found = "no GPU" if code == _NO_DEVICE else f"error {code}"
        return f"the NVIDIA driver is installed but cannot start: {found}"
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    for code in (
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDeviceGetName(name, _NAME_BYTES, device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device),
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device),
    ):
        if code:
            return f"the NVIDIA driver shows no usable GPU: error {code}"
    return Gpu(name.value.decode(errors="replace"), f"sm{major.value}{minor.value}")


def driver_version(load: Callable[[str], Any] = ctypes.CDLL) -> str:
    """Return the CUDA release that the driver goes up to, as it numbers it (13000); "" without a
    driver.

    Args:
        load: opens a shared library; a test passes its own.
    """
    version = ctypes.c_int()
    try:
        code = load(LIBRARY).cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return ""
    return "" if code else str(version.value)


def free_bytes(load: Callable[[str], Any] = ctypes.CDLL) -> int | None:
    """Memory of the GPU that nobody has taken; None without a GPU.

    Args:
        load: opens a shared library; a test passes its own.
    """
    if isinstance(find(load), str):
        return None
    driver, device, context = load(LIBRARY), ctypes.c_int(), ctypes.c_void_p()
    free, whole = ctypes.c_size_t(), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    # the context that CUDA's runtime uses too: once somebody has it, this costs nothing
    if driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) != _OK:
        return None
    try:
        driver.cuCtxPushCurrent_v2(context)
        told = driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(whole))
        driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)
    return free.value if told == _OK else None
