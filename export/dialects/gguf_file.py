"""GGUF files: their tensors, dequantized by the `gguf` package, some rows at a time."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export import foreign
from export.errors import CheckpointError
from export.stored import Entry, Rows, file_identity

MAGIC = b"GGUF"
# Elements that are dequantized at once: the package takes several times their memory.
AT_ONCE = 1 << 21
_AS_THEY_ARE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def is_one(file: Path) -> bool:
    """Say whether a file is GGUF, by its first bytes."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def entries(file: Path) -> dict[str, Entry]:
    """Return the tensors of a GGUF file.

    Raises:
        CheckpointError: it is damaged, or of a version, byte order or type that the `gguf` package
            does not know.
        ModuleNotFoundError: the package is not installed.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # it raises whatever bytes run into
        raise CheckpointError(
            f"{file}: not a complete GGUF file that the gguf package can read: "
            f"{type(error).__name__}: {error}",
            hint=f"{foreign.DOWNLOAD}; or update the package: pip install -U gguf",
        ) from None
    if reader.byte_order != "I":
        raise CheckpointError(
            f"{file}: is a GGUF file in big-endian byte order", hint="give one in little-endian"
        )
    identity = file_identity(file)
    found = {}
    for tensor in reader.tensors:
        kind, shape = tensor.tensor_type.name, tuple(int(n) for n in reversed(tensor.shape))
        gives = _AS_THEY_ARE.get(kind)
        if gives is None and _known(kind):
            gives = torch.float32
        found[tensor.name] = Entry(
            *(file, kind, shape, f"{identity}:{tensor.name}", gives),
            functools.partial(
                _read, file, kind, shape, int(tensor.data_offset), int(tensor.n_bytes)
            ),
        )
    return found


@functools.cache
def _known(kind: str) -> bool:
    """Say whether the package dequantizes a type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    number = GGMLQuantizationType[kind]
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


def _read(
    file: Path, kind: str, shape: tuple[int, ...], offset: int, size: int, rows: Rows = None
) -> Tensor:
    if len(shape) < 2 and rows is not None:  # its blocks do not end where rows do
        return _read(file, kind, shape, offset, size)[rows[0] : rows[1]].clone()
    first, behind = rows or (0, shape[0] if shape else 1)
    number = behind - first if len(shape) > 1 else 1
    row = size // (shape[0] if len(shape) > 1 else 1)  # bytes
    inner = shape[1:] if len(shape) > 1 else shape
    if kind in _AS_THEY_ARE:
        data = _bytes(file, offset + first * row, number * row)
        values = torch.from_numpy(data).view(_AS_THEY_ARE[kind])
        return values.reshape(number, *inner) if len(shape) > 1 else values.reshape(shape)
    from gguf import GGMLQuantizationType, dequantize

    result = torch.empty(number, int(np.prod(inner)))
    step = max(1, AT_ONCE // max(1, result.shape[1]))
    for at in range(0, number, step):
        some = min(step, number - at)
        codes = _bytes(file, offset + (first + at) * row, some * row).reshape(some, row)
        part = dequantize(codes, GGMLQuantizationType[kind])
        result[at : at + some] = torch.from_numpy(part).reshape(some, -1)
    return result.reshape(number, *inner) if len(shape) > 1 else result.reshape(shape)


def _bytes(file: Path, offset: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    found = np.fromfile(file, np.uint8, size, offset=offset)
    if found.size != size:
        raise CheckpointError(f"{file}: ends before its tensors do", hint=foreign.DOWNLOAD)
    return found
