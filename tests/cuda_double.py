"""`cuda.bindings.runtime` without a GPU: the functions that this project calls, over host memory.

It is strict where a GPU would crash or read rubbish: addresses that were never allocated or were
freed, work that is recorded and must not run, a recording that blocking work elsewhere breaks.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

OK, FULL, OLD_DRIVER, IMPLICIT, CAPTURED = 0, 2, 35, 906, 901
NON_BLOCKING = 1
MEMORY = 1 << 34


class Runtime:
    """Every function answers (status, results …), as the bindings do.

    Args:
        fails: function -> the status that it answers.
        integrated: whether the GPU shares the machine's memory.
    """

    cudaStreamNonBlocking = NON_BLOCKING
    CUDART_VERSION = 13050
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaDeviceAttr = SimpleNamespace(cudaDevAttrIntegrated=18)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, fails: dict[str, int] | None = None, integrated: bool = False) -> None:
        self.fails, self.integrated = fails or {}, integrated
        self.blocks: dict[int, Any] = {}
        self.streams: dict[int, int] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.broken = False
        self.launches = 0
        self._thread = 0

    def __getattribute__(self, name: str) -> Any:
        fails = object.__getattribute__(self, "__dict__").get("fails", {})
        if name in fails:
            return lambda *arguments: (fails[name],)
        return object.__getattribute__(self, name)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return OK, f"status {status}".encode()

    def cudaDriverGetVersion(self) -> tuple[int, int]:
        return OK, 12040

    def cudaRuntimeGetVersion(self) -> tuple[int, int]:
        return OK, self.CUDART_VERSION

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        assert (attribute, device) == (18, 0)
        return OK, int(self.integrated)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:
        self.streams[len(self.streams) + 1] = flags
        return OK, len(self.streams)

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (CAPTURED if self.recording is not None else OK,)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:
        return OK, MEMORY - sum(ctypes.sizeof(block) for block in self.blocks.values()), MEMORY

    def cudaMalloc(self, size: int) -> tuple[int, ...]:
        if size > MEMORY:
            return (FULL,)
        block = (ctypes.c_uint8 * size)()
        self.blocks[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> tuple[int]:
        del self.blocks[address]
        return (OK,)

    cudaFreeHost = cudaFree

    def cudaMemset(self, address: int, value: int, size: int) -> tuple[int]:
        """On the legacy default stream, which streams of the ordinary kind wait for."""
        if self.recording is not None and NON_BLOCKING not in self.streams.values():
            self.broken = True
            return (IMPLICIT,)
        ctypes.memset(address, value, size)
        return (OK,)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: int, stream: int
    ) -> tuple[int]:
        assert stream in self.streams
        for address in {1: (to,), 2: (source,), 3: (to, source)}[kind]:
            assert size <= ctypes.sizeof(self.blocks[address]), "past the end of its memory"

        def copy() -> None:
            ctypes.memmove(to, source, size)

        if self.recording is None:
            copy()
        else:
            assert threading.get_ident() == self._thread
            self.recording.append(copy)
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:
        self.recording, self.broken, self._thread = [], False, threading.get_ident()
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, Any]:
        recorded, self.recording = self.recording, None
        return (IMPLICIT, None) if self.broken else (OK, recorded)

    def cudaGraphGetNodes(self, graph: list[Any]) -> tuple[int, list[Any], int]:
        return OK, graph, len(graph)

    def cudaGraphInstantiate(self, graph: list[Any], flags: int) -> tuple[int, list[Any]]:
        return OK, list(graph)

    def cudaGraphDestroy(self, graph: list[Any]) -> tuple[int]:
        return (OK,)

    def cudaGraphLaunch(self, graph: list[Any], stream: int) -> tuple[int]:
        self.launches += 1
        for work in graph:
            work()
        return (OK,)

    def cudaGraphExecDestroy(self, graph: list[Any]) -> tuple[int]:
        return (OK,)
