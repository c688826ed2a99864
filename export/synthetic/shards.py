"""Write safetensors as a stream: the header first, then tensor after tensor, a block at a time.

`safetensors.torch.save_file` takes all tensors of a file at once; a shard of a true-size checkpoint
would not fit in memory. Here it holds one block, whatever the shapes.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from export import formats

# name in a safetensors header, bytes per element
FORMATS = {
    **{f.name: (f.safetensors, f.other_bytes) for f in formats.FORMATS.values() if f.safetensors},
    "int64": ("I64", 8),
}
_TORCH = {f.name: getattr(torch, f.dtype) for f in formats.FORMATS.values() if f.safetensors}
BLOCK = 1 << 22  # elements


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: normal(mean, std), or the whole number `mean` where std is 0.

    Attributes:
        positive: absolute values, for what must not be negative.
    """

    name: str
    shape: tuple[int, ...]
    mean: float
    std: float
    positive: bool = False


def write(
    folder: Path,
    stem: str,
    tensors: Sequence[Planned],
    dtype: str,
    shard_bytes: int,
    seed: int | None,
) -> int:
    """Write `{stem}.safetensors`, or shards and their index where it takes more than one.

    A tensor's values depend on (seed, folder's name, tensor's name) alone, not on the shards.
    With no seed the files have their headers and a hole where the values would be: an outline that
    takes no space on disk.

    Returns:
        Bytes of all tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, dtype, shard_bytes)
    total = sum(_bytes(t, dtype) for t in tensors)
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", shards[0], dtype, seed)
        return total
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(file, shard, dtype, seed)
        weight_map |= {t.name: file.name for t in shard}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def _shards(tensors: Sequence[Planned], dtype: str, limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    room = limit
    for tensor in tensors:
        size = _bytes(tensor, dtype)
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_file(file: Path, tensors: list[Planned], dtype: str, seed: int | None) -> None:
    # the widest elements first keeps every tensor aligned
    tensors = sorted(tensors, key=lambda t: -FORMATS[_format(t, dtype)][1])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _bytes(tensor, dtype)
        header[tensor.name] = {
            "dtype": FORMATS[_format(tensor, dtype)][0],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        if seed is None:
            stream.truncate(stream.tell() + end)
            return
        for tensor in tensors:
            _write_tensor(stream, tensor, dtype, f"{seed}/{file.parent.name}/{tensor.name}")


def _write_tensor(stream: BinaryIO, tensor: Planned, dtype: str, key: str) -> None:
    if _format(tensor, dtype) == "int64":
        stream.write(torch.full(tensor.shape, int(tensor.mean)).numpy().tobytes())
        return
    for block in _blocks(tensor, key):
        # numpy has no bfloat16: the bytes go out as what numpy knows
        stream.write(block.to(_TORCH[dtype]).view(torch.uint8).numpy().tobytes())


def _blocks(tensor: Planned, key: str) -> Iterator[Tensor]:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    left = math.prod(tensor.shape)
    while left:
        values = torch.randn(min(left, BLOCK), generator=generator)
        values = values * tensor.std + tensor.mean
        yield values.abs() if tensor.positive else values
        left -= len(values)


def _format(tensor: Planned, dtype: str) -> str:
    return dtype if tensor.std else "int64"


def _bytes(tensor: Planned, dtype: str) -> int:
    return math.prod(tensor.shape) * FORMATS[_format(tensor, dtype)][1]
