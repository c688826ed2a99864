"""What the TensorRT backends stand on, tried on a real GPU without TensorRT: memory, copies, the
stream and its recordings (`bifrost_rt.backends.cuda`)."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt.backends.cuda import Cuda, DeviceBuffer
from bifrost_rt.errors import BackendError

SIZE = 256 << 20
TOO_MUCH = 1 << 50


def check(runtime: Any = None, size: int = SIZE) -> dict[str, Any]:
    """Every figure of the first GPU.

    Args:
        runtime: the module `cuda.bindings.runtime`; a test passes a double.
        size: bytes of a copy.

    Raises:
        BackendError: it cannot be used at all.
    """
    cuda = Cuda(runtime)
    found = _memory(cuda, size)
    found["free_bytes_at_the_end"] = cuda.free_bytes()
    return found


def _memory(cuda: Cuda, size: int) -> dict[str, Any]:
    """Everything, on buffers that go when it is done."""
    free = cuda.free_bytes()
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    one, other = (DeviceBuffer(cuda, (size,), np.uint8) for _ in range(2))
    found: dict[str, Any] = {
        "driver_cuda": cuda._call("cudaDriverGetVersion"),
        "runtime_cuda": cuda._call("cudaRuntimeGetVersion"),
        "unified_memory": cuda.unified,
        "free_bytes": free,
        "free_bytes_told_by_cuda": int(cuda._call("cudaMemGetInfo")),
        "taken_for_two_buffers": free - cuda.free_bytes(),
        "bytes": size,
    }
    pageable = _rate(lambda: cuda.copy_in(one.address, source), size)
    found |= {"upload_gb_s_pageable": pageable, **_pinned(cuda, one.address, source)}
    back = np.empty_like(source)
    found["download_gb_s_pageable"] = _rate(lambda: cuda.copy_out(back, one.address), size)
    found["copies_agree"] = bool(np.array_equal(back, source))
    found |= _recording(cuda, one, other, source)
    found["refusals"] = _refusals(cuda)
    return found


def _pinned(cuda: Cuda, address: int, source: NDArray[np.uint8]) -> dict[str, Any]:
    """Return copies from memory that the GPU reads by itself."""
    host = cuda._call("cudaMallocHost", source.nbytes)
    try:
        place = (ctypes.c_uint8 * source.nbytes).from_address(int(host))
        pinned = np.ctypeslib.as_array(place)
        start = time.perf_counter()
        pinned[:] = source
        into = round(source.nbytes / (time.perf_counter() - start) / 1e9, 2)
        rate = _rate(lambda: cuda.copy_in(address, pinned), source.nbytes)
        return {"upload_gb_s_pinned": rate, "host_copy_gb_s_into_pinned": into}
    finally:
        cuda._call("cudaFreeHost", host)


def _recording(
    cuda: Cuda, one: DeviceBuffer, other: DeviceBuffer, source: NDArray[np.uint8]
) -> dict[str, Any]:
    """Return a copy on the device, recorded while another thread works on the legacy default
    stream, and replayed on what changed meanwhile."""
    inside = cuda._runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    scratch = DeviceBuffer(cuda, (1024,), np.uint8)
    elsewhere: list[str] = []

    def legacy() -> None:
        try:
            cuda._call("cudaMemset", scratch.address, 0, scratch.nbytes)
        except BackendError as error:
            elsewhere.append(error.message)

    def copy() -> None:
        cuda._call("cudaMemcpyAsync", other.address, one.address, one.nbytes, inside, cuda.stream)

    def work() -> None:
        thread = threading.Thread(target=legacy)
        thread.start()
        thread.join()
        copy()

    replay = cuda.capture(work)
    back, changed = np.empty_like(source), source[::-1].copy()
    cuda.copy_in(one.address, changed)
    replay()
    cuda.copy_out(back, other.address)
    found: dict[str, Any] = {
        "replay_agrees": bool(np.array_equal(back, changed)),
        "legacy_stream_meanwhile": elsewhere[0] if elsewhere else "worked",
    }
    for name, call in (("copy", copy), ("replayed_copy", replay)):
        cuda.wait()
        start = time.perf_counter()
        for _ in range(20):
            call()
        queued = time.perf_counter() - start
        cuda.wait()
        whole = time.perf_counter() - start
        found[f"{name}_us"] = round(1e6 * whole / 20, 2)
        found[f"{name}_host_us"] = round(1e6 * queued / 20, 2)
    found["on_device_gb_s"] = round(2 * one.nbytes / found["copy_us"] / 1e3, 1)
    return found


def _refusals(cuda: Cuda) -> dict[str, str]:
    """Return what it says of an empty recording, of one that fails, and of too much memory; it must
    be usable after each."""
    found = {}

    def fails() -> None:
        raise BackendError("work that failed")

    for name, attempt in (
        ("empty_recording", lambda: cuda.capture(lambda: None)),
        ("failed_recording", lambda: cuda.capture(fails)),
        ("too_much_memory", lambda: cuda.allocate(TOO_MUCH)),
    ):
        try:
            attempt()
            found[name] = "was not refused"
        except BackendError as error:
            found[name] = error.message
        cuda.wait()
    return found


def _rate(copy: Any, size: int) -> float:
    """GB/s, the best of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start)
    return round(size / min(seconds) / 1e9, 2)
