"""A tensor as a file stores it, and the tensors of a safetensors file."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from export import foreign
from export.errors import CheckpointError
from export.formats import FORMATS

FLOATS = {f.safetensors: getattr(torch, f.dtype) for f in FORMATS.values() if f.safetensors}
# First row, first row behind them; None: all.
Rows = tuple[int, int] | None


@dataclass(frozen=True)
class Entry:
    """One tensor, not read.

    Attributes:
        dtype: how the file stores it, in the file's own word: BF16, F8_E4M3, Q4_K.
        identity: equal only for entries of equal values.
        gives: the type in which it can be read; None: it cannot.
        read: its values, or those of some of its rows.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    identity: str
    gives: torch.dtype | None
    read: Callable[[Rows], Tensor]


def file_identity(file: Path) -> str:
    """Return what changes whenever the file's bytes may have: the system gives a new change time to
    whatever is written, moved or linked, and no tool sets it back."""
    found = file.stat()
    return f"{os.path.realpath(file)}:{found.st_ino}:{found.st_size}:{found.st_ctime_ns}"


def of_safetensors(file: Path) -> dict[str, Entry]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: it is damaged, or something else.
    """
    try:
        identity = file_identity(file)
        with safe_open(file, framework="pt") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            return {
                name: Entry(
                    file,
                    s.get_dtype(),
                    tuple(s.get_shape()),
                    f"{identity}:{name}",
                    FLOATS.get(s.get_dtype()),
                    functools.partial(_read, file, name),
                )
                for name, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        found = foreign.file(file)
        raise CheckpointError(
            f"{file}: not a complete safetensors file: "
            + (f"it is {found.what}" if found else str(error)),
            hint=found.hint if found else "copy or download it again",
        ) from None


def _read(file: Path, name: str, rows: Rows = None) -> Tensor:
    with safe_open(file, framework="pt") as stream:
        if rows is None:
            tensor: Tensor = stream.get_tensor(name)
        else:
            tensor = stream.get_slice(name)[rows[0] : rows[1]]
    return tensor
