"""Engines whose files are links, as in a hub's cache or where the weights are on another disk.

onnxruntime and OpenVINO refuse weights that lie outside of the graph's folder, because a foreign
graph could name any file of the machine. A set's files were compared with their hashes, so the
graph is handed over as bytes in which every file of weights is named as what it is.

A graph is a protobuf message; the few fields on the way to those names are read and written here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import REBUILD, EngineSpec

# ModelProto.graph, GraphProto.initializer, TensorProto.external_data; a pair's key and value.
_GRAPH, _INITIALIZER, _EXTERNAL, _KEY, _VALUE = 7, 5, 13, 1, 2
# How a graph names memory of its own process instead of a file; its offset is the address.
_IN_MEMORY = "*/_ORT_MEM_ADDR_/*"
_MODEL_FOLDER = "session.model_external_initializers_file_folder_path"

Entries = Mapping[str, str]


def real_files(folder: Path, spec: EngineSpec) -> dict[str, Path]:
    """Say where an engine's files really are, by name; nothing where none of them is a link."""
    found = {name: Path(os.path.realpath(folder / name)) for name in (*spec.files, *spec.shared)}
    base = Path(os.path.realpath(folder))
    return {} if all(path == base / name for name, path in found.items()) else found


def for_onnxruntime(folder: Path, spec: EngineSpec, options: Any) -> str | bytes:
    """Return what an onnxruntime session is made from: the graph's path, or its bytes, with the
    folder of its weights among the session's `options`."""
    files = real_files(folder, spec)
    if not files:
        return str(folder / spec.graph)
    base = os.path.commonpath([path.parent for path in files.values()])
    options.add_session_config_entry(_MODEL_FOLDER, base)

    def entries(named: Entries) -> Entries:
        place = _file(folder, spec, files, named).relative_to(base)
        return {**named, "location": place.as_posix()}

    return with_entries((folder / spec.graph).read_bytes(), entries)


def in_memory(folder: Path, spec: EngineSpec) -> tuple[bytes, list[NDArray[np.uint8]]] | None:
    """Return the graph with its weights by address, and the mapped files that must outlive what is
    made from it; None where no file of the engine is a link."""
    files = real_files(folder, spec)
    if not files:
        return None
    held: dict[Path, NDArray[np.uint8]] = {}

    def entries(named: Entries) -> Entries:
        path = _file(folder, spec, files, named)
        if path not in held:
            held[path] = np.memmap(path, np.uint8, "r")
        content = held[path]
        offset, length = int(named.get("offset", 0)), int(named.get("length", 0))
        if not 0 < length <= len(content) - offset or offset < 0:
            raise BackendError(
                f"{folder / spec.graph}: names bytes {offset} to {offset + length} of "
                f"{named['location']}, which has {len(content)}",
                hint=REBUILD,
            )
        address = content.ctypes.data + offset
        return {"location": _IN_MEMORY, "offset": str(address), "length": str(length)}

    graph = with_entries((folder / spec.graph).read_bytes(), entries)
    return graph, list(held.values())


def _file(folder: Path, spec: EngineSpec, files: Mapping[str, Path], named: Entries) -> Path:
    """Return the file of a tensor: one of the engine's own, whose hashes were checked."""
    location = named.get("location", "")
    if location not in files:
        raise BackendError(
            f"{folder / spec.graph}: reads {location!r}, which is no file of this engine",
            hint=REBUILD,
        )
    return files[location]


def with_entries(model: bytes, change: Callable[[Entries], Entries]) -> bytes:
    """Return a model whose weights are elsewhere.

    Args:
        change: the `external_data` of a tensor (location, offset, length) -> what it becomes.
    """

    def graph(message: memoryview) -> bytes:
        return _with_field(message, _INITIALIZER, tensor)

    def tensor(message: memoryview) -> bytes:
        pairs = [_pair(value) for number, value, _ in _fields(message) if number == _EXTERNAL]
        if not pairs:
            return bytes(message)
        kept: list[bytes | memoryview] = [
            raw for number, _, raw in _fields(message) if number != _EXTERNAL
        ]
        for key, value in change(dict(pairs)).items():
            pair = _field(_KEY, key.encode()) + _field(_VALUE, value.encode())
            kept.append(_field(_EXTERNAL, pair))
        return b"".join(kept)

    return _with_field(memoryview(model), _GRAPH, graph)


def _with_field(message: memoryview, wanted: int, change: Callable[[memoryview], bytes]) -> bytes:
    """Return a message in which every field of one number is changed."""
    return b"".join(
        _field(number, change(value)) if number == wanted else raw
        for number, value, raw in _fields(message)
    )


def _pair(message: memoryview) -> tuple[str, str]:
    found = {number: bytes(value).decode() for number, value, _ in _fields(message)}
    return found[_KEY], found.get(_VALUE, "")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Yield (number, value, whole) of every field; values of numbers are empty."""
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        kind, size = tag & 7, 0
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
        else:
            at += {1: 8, 5: 4}[kind]
        at += size
        yield tag >> 3, message[at - size : at], message[start:at]


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _field(number: int, value: bytes) -> bytes:
    return _as_varint(number << 3 | 2) + _as_varint(len(value)) + value


def _as_varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    found.append(value)
    return bytes(found)
