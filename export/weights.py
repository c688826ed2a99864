"""One folder of safetensors, read lazily and strictly: a tensor is read when it is asked for, and
what is missing, damaged or left over is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from export import sources
from export.errors import CheckpointError
from export.sources import Source

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What other tools leave in a checkpoint folder. Not read: pickles can run code when they are
# opened, and FSDP shards are training state.
FOREIGN = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.gguf", "pytorch_model_fsdp*")
BLOCK = 1 << 22  # elements: a check of a whole embedding would take as much memory again


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass
class Weights:
    """The tensors of a folder, by name. `used` collects what was read, to find the left-overs."""

    folder: Path
    entries: dict[str, Entry]
    ignored_files: tuple[str, ...] = ()
    used: set[str] = field(default_factory=set)

    @classmethod
    def open(cls, folder: Path, stem: str) -> Weights:
        """Open `{stem}.safetensors`, or the shards of `{stem}.safetensors.index.json`.

        Raises:
            CheckpointError: neither or both are there, a shard is missing or truncated, or the
                index and the shards disagree.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        foreign = tuple(sorted({p.name for pattern in FOREIGN for p in folder.glob(pattern)}))
        single = folder / f"{stem}.safetensors"
        index = folder / f"{stem}.safetensors.index.json"
        if single.exists() and index.exists():
            raise CheckpointError(
                f"{folder}: holds both {single.name} and {index.name}",
                hint="remove the one that is not the trained model",
            )
        if single.exists():
            return cls(folder, _entries(single), foreign)
        if not index.exists():
            found = ", ".join(foreign) or "nothing of the kind"
            raise CheckpointError(
                f"{folder}: expected {single.name} or {index.name}, found {found}",
                hint="convert other formats to safetensors first, for example with "
                "`save_pretrained(..., safe_serialization=True)`; pickles are not opened here",
            )
        return cls(folder, _sharded(folder, index), foreign)

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        if name not in self.entries:
            raise CheckpointError(f"{self.folder}: missing tensor {name}")
        return self.entries[name].shape

    def source(self, name: str) -> Source:
        """One tensor, in its file's dtype, read when it is asked for.

        Raises:
            CheckpointError: not floating point; when it is read, not finite.
        """
        entry = self.entries[name]
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{entry.file}: tensor {name} is {entry.dtype}, expected " + ", ".join(FLOATS)
            )
        self.used.add(name)
        identity = f"{file_identity(entry.file)}:{name}"
        return Source(entry.shape, FLOATS[entry.dtype], identity, lambda: _read(entry.file, name))

    def unused(self, allowed: Iterable[str] = ()) -> list[str]:
        """Tensors that nobody read, apart from those whose name starts with an allowed prefix."""
        prefixes = tuple(allowed)
        return sorted(
            n for n in self.entries if n not in self.used and not n.startswith(prefixes or "\0")
        )


def file_identity(file: Path) -> str:
    """Changes whenever the file's bytes may have: the system gives a new change time to whatever is
    written, moved or linked, and no tool sets it back."""
    found = file.stat()
    return f"{os.path.realpath(file)}:{found.st_ino}:{found.st_size}:{found.st_ctime_ns}"


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as stream:
        tensor: Tensor = stream.get_tensor(name)
    if not all(torch.isfinite(block).all() for block in tensor.flatten().split(BLOCK)):
        raise CheckpointError(f"{file}: tensor {name} holds NaN or infinite values")
    return tensor


def _entries(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt") as stream:
            slices = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
            return {
                name: Entry(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a complete safetensors file ({error})", hint="copy or download it again"
        ) from None


def _sharded(folder: Path, index: Path) -> dict[str, Entry]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a safetensors index ({error!r})") from None
    entries: dict[str, Entry] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: names a file outside its folder: {shard!r}")
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard}: missing; {index.name} lists it",
                hint="copy or download the missing shard",
            )
        entries |= _entries(folder / shard)
    if lost := sorted(
        n for n, f in weight_map.items() if getattr(entries.get(n), "file", None) != folder / f
    ):
        raise CheckpointError(f"{index}: not in the shard that it names: {_listed(lost)}")
    if extra := sorted(entries.keys() - weight_map.keys()):
        raise CheckpointError(
            f"{index}: shards hold tensors that it does not list: {_listed(extra)}"
        )
    return entries


def fill(
    module: nn.Module,
    what: str,
    find: Callable[[str], tuple[Weights, str]],
    *,
    read: bool = True,
) -> None:
    """Give every tensor of a module on the meta device its source.

    Args:
        what: how errors call the module.
        find: a parameter's name -> the folder that should hold it, and its key there.
        read: whether to read them all at once, in float32. Otherwise the module stays on the meta
            device; names and shapes are checked.

    Raises:
        CheckpointError: listing every tensor that is missing or has another shape.
    """
    # tied parameters have two names and one key: both get the one tensor that is read
    parameters = dict(module.named_parameters(remove_duplicate=False))
    wanted = {**parameters, **dict(_persistent_buffers(module))}
    missing, misshapen = [], []
    for name, parameter in wanted.items():
        weights, key = find(name)
        if key not in weights:
            missing.append(f"{key} {list(parameter.shape)} in {weights.folder}")
        elif weights.shape(key) != tuple(parameter.shape):
            misshapen.append(
                f"{key}: expected {list(parameter.shape)}, found {list(weights.shape(key))}"
            )
    if missing:
        raise CheckpointError(f"{what}: missing tensors: {_listed(missing)}")
    if misshapen:
        raise CheckpointError(
            f"{what}: tensors of a wrong shape: {_listed(misshapen)}",
            hint="the weights do not belong to the config.json beside them",
        )
    for name in wanted:
        weights, key = find(name)
        prefix, _, leaf = name.rpartition(".")
        sources.attach(module.get_submodule(prefix), leaf, weights.source(key))
    if read:
        sources.load(module)
    module.eval().requires_grad_(False)


def refuse_unused(weights: Weights, what: str, allowed: Iterable[str] = ()) -> None:
    """Raise for tensors that no module took.

    Raises:
        CheckpointError: naming them.
    """
    if unused := weights.unused(allowed):
        raise CheckpointError(
            f"{what}: unexpected tensors in {weights.folder}: {_listed(unused)}",
            hint="the checkpoint is of a variant that is not supported, or of another model",
        )


def _persistent_buffers(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    kept = module.state_dict(keep_vars=True).keys()
    for name, buffer in module.named_buffers():
        # a batch norm counts its training batches; inference never reads the count
        if name in kept and not name.endswith("num_batches_tracked"):
            yield name, buffer


def _listed(names: list[str], limit: int = 12) -> str:
    rest = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
