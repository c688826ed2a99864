"""One folder of safetensors, read lazily and strictly: a tensor is read when it is asked for, and
what is missing, damaged or left over is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from export import foreign, sources, weight_files
from export.errors import CheckpointError
from export.formats import FORMATS
from export.sources import Source
from export.weight_files import WeightFiles

FLOATS = {f.safetensors: getattr(torch, f.dtype) for f in FORMATS.values() if f.safetensors}
# In the names of tensors of a model that was saved with its adapters beside the weights.
UNMERGED = (".base_layer.", ".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".lora_magnitude_")
# What tools put in front of every name of a model that they hold.
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel or DeepSpeed",
    "base_model.model.": "peft",
    "_fsdp_wrapped_module.": "FSDP",
}
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
    def open(cls, folder: Path, *stems: str) -> Weights:
        """Open the model of a folder, by the first of `stems` that it has files of.

        Raises:
            CheckpointError: it holds none or several, a file is missing, damaged or no weights,
                the index and the shards disagree, or adapters were not merged.
        """
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        found = weight_files.find(folder, stems)
        entries = _all_entries(found)
        _refuse_unmerged(folder, entries)
        return cls(folder, entries, weight_files.ignored(folder))

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def shape(self, name: str, rank: int | None = None) -> tuple[int, ...]:
        """Shape of a tensor, without reading it.

        Raises:
            CheckpointError: there is none, or it has not `rank` dimensions.
        """
        if name not in self.entries:
            raise CheckpointError(
                f"{self.folder}: missing tensor {name}", hint=_wrapped(self, name)
            )
        shape = self.entries[name].shape
        if rank is not None and len(shape) != rank:
            raise CheckpointError(
                f"{self.folder}: tensor {name} has the shape {list(shape)}, expected {rank} "
                "dimensions"
            )
        return shape

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
        found = foreign.file(file)
        raise CheckpointError(
            f"{file}: not a complete safetensors file: "
            + (f"it is {found.what}" if found else str(error)),
            hint=found.hint if found else "copy or download it again",
        ) from None


def _all_entries(found: WeightFiles) -> dict[str, Entry]:
    """The tensors of all files. An index may list fewer than its shards hold."""
    entries: dict[str, Entry] = {}
    for file in found.files:
        for name, entry in _entries(file).items():
            listed = found.listed.get(name, file)
            if name in entries and name not in found.listed:
                raise CheckpointError(
                    f"{file}: holds tensor {name}, and so does {entries[name].file.name}",
                    hint="remove the file that is not of the trained model",
                )
            if listed == file:
                entries[name] = entry
    if lost := sorted(found.listed.keys() - entries.keys()):
        raise CheckpointError(f"{found.index}: not in the shard that it names: {_listed(lost)}")
    return entries


def _refuse_unmerged(folder: Path, entries: Iterable[str]) -> None:
    if unmerged := sorted(n for n in entries if any(mark in f".{n}" for mark in UNMERGED)):
        raise CheckpointError(
            f"{folder}: holds a LoRA adapter that was not merged: {_listed(unmerged, 3)}",
            hint="merge it (`merge_and_unload()` of peft, `fuse_lora()` and "
            "`unload_lora_weights()` of diffusers) and save the model again",
        )


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
    missing: dict[str, Weights] = {}
    misshapen: dict[str, Weights] = {}
    for name, parameter in wanted.items():
        weights, key = find(name)
        expected = list(parameter.shape)
        if key not in weights:
            missing[f"{key} {expected} in {weights.folder}"] = weights
        elif (shape := list(weights.shape(key))) != expected:
            misshapen[f"{key}: expected {expected}, found {shape}"] = weights
    if missing:
        first, weights = next(iter(missing.items()))
        raise CheckpointError(
            f"{what}: missing tensors: {_listed(list(missing))}",
            hint=_wrapped(weights, first.split(" ")[0]),
        )
    if misshapen:
        folder = next(iter(misshapen.values())).folder
        raise CheckpointError(
            f"{what}: tensors of a wrong shape in {folder}: {_listed(list(misshapen))}",
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


def _wrapped(weights: Weights, key: str) -> str | None:
    """Why a tensor is missing that is there under a longer name."""
    for prefix, tool in WRAPPERS.items():
        if any(prefix in name and name.replace(prefix, "") == key for name in weights.entries):
            return f"its names hold {prefix!r}, which {tool} puts there: save the model without it"
    packed = [key.removesuffix(".weight") + end for end in (".qweight", ".weight_packed")]
    if any(name in weights.entries for name in packed):
        return "it is there in 4 bit (AWQ, GPTQ): give the model before it was quantized"
    return None


def _persistent_buffers(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    kept = module.state_dict(keep_vars=True).keys()
    for name, buffer in module.named_buffers():
        # a batch norm counts its training batches; inference never reads the count
        if name in kept and not name.endswith("num_batches_tracked"):
            yield name, buffer


def _listed(names: list[str], limit: int = 12) -> str:
    rest = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
