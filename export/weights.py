"""One folder or file of weights, read lazily and strictly: a tensor is read when it is asked for,
and what is missing, damaged or left over is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from export import lazy_tensors, weight_files
from export.dialects import float8, gguf_file
from export.dialects.place import Place
from export.errors import CheckpointError
from export.lazy_tensors import LazyTensor
from export.stored import FLOATS, Entry, Rows, of_safetensors
from export.weight_files import WeightFiles

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


@dataclass
class Weights:
    """The tensors of a folder or of one file, by name.

    Attributes:
        folder: the folder, or the file.
        used: what was read, to find the left-overs.
    """

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
        return cls(folder, float8.unpack(entries), weight_files.ignored(folder))

    @classmethod
    def open_file(cls, file: Path) -> Weights:
        """Open a single file: safetensors or GGUF, by what it holds.

        Raises:
            CheckpointError: it is missing, damaged or something else, or holds an adapter.
        """
        if gguf_file.is_one(file):
            return cls(file, gguf_file.entries(file))
        entries = of_safetensors(file)
        _refuse_unmerged(file, entries)
        return cls(file, float8.unpack(entries))

    def below(self, prefix: str) -> Weights:
        """Return the tensors whose names begin with `prefix`, without it."""
        found = {n.removeprefix(prefix): e for n, e in self.entries.items() if n.startswith(prefix)}
        return Weights(self.folder, found)

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

    def source(self, name: str, rows: Rows = None) -> LazyTensor:
        """One tensor, or some of its rows, read when it is asked for; in the file's dtype, or in
        one that holds the values which the file packs.

        Raises:
            CheckpointError: not floating point; when it is read, not finite.
        """
        entry = self.entries[name]
        if entry.gives is None:
            raise unreadable(name, entry)
        self.used.add(name)
        if rows is None:
            return LazyTensor(entry.shape, entry.gives, entry.identity, lambda: _read(entry, name))
        first, behind = rows
        return LazyTensor(
            (behind - first, *entry.shape[1:]),
            entry.gives,
            f"{entry.identity}[{first}:{behind}]",
            lambda: _read(entry, name, rows),
        )

    def packed(self) -> dict[str, int]:
        """Say how many of the tensors that were read the file stores in less than 16 bit, by
        type."""
        kinds = Counter(self.entries[name].dtype for name in self.used)
        return {kind: kinds[kind] for kind in sorted(kinds) if kind not in FLOATS}

    def unused(self, allowed: Iterable[str] = ()) -> list[str]:
        """Tensors that nobody read, apart from those whose name starts with an allowed prefix."""
        prefixes = tuple(allowed)
        return sorted(
            n for n in self.entries if n not in self.used and not n.startswith(prefixes or "\0")
        )


def unreadable(name: str, entry: Entry) -> CheckpointError:
    """Say that a tensor is of a type that cannot be read."""
    if gguf_file.is_one(entry.file):
        return CheckpointError(
            f"{entry.file}: tensor {name} is {entry.dtype}, which the gguf package does not "
            "dequantize",
            hint="give the model in another type, such as Q8_0, Q4_K or BF16",
        )
    return CheckpointError(
        f"{entry.file}: tensor {name} is {entry.dtype}, expected "
        + ", ".join((*FLOATS, *float8.CODES)),
        hint="give the model before it was quantized",
    )


def is_finite(tensor: Tensor) -> bool:
    """Say whether all values are, without a copy of the tensor."""
    return all(bool(torch.isfinite(b).all()) for b in tensor.flatten().split(BLOCK))


def _read(entry: Entry, name: str, rows: Rows = None) -> Tensor:
    tensor = entry.read(rows)
    if not is_finite(tensor):
        raise CheckpointError(f"{entry.file}: tensor {name} holds NaN or infinite values")
    return tensor


def _all_entries(found: WeightFiles) -> dict[str, Entry]:
    """Return the tensors of all files. An index may list fewer than its shards hold."""
    entries: dict[str, Entry] = {}
    for file in found.files:
        for name, entry in of_safetensors(file).items():
            shard = found.listed.get(name, file)
            if name in entries and name not in found.listed:
                raise CheckpointError(
                    f"{file}: holds tensor {name}, and so does {entries[name].file.name}",
                    hint="remove the file that is not of the trained model",
                )
            if shard == file:
                entries[name] = entry
    if lost := sorted(found.listed.keys() - entries.keys()):
        raise CheckpointError(f"{found.index}: not in the shard that it names: {listed(lost)}")
    return entries


def _refuse_unmerged(folder: Path, entries: Iterable[str]) -> None:
    if unmerged := sorted(n for n in entries if any(mark in f".{n}" for mark in UNMERGED)):
        raise CheckpointError(
            f"{folder}: holds a LoRA adapter that was not merged: {listed(unmerged, 3)}",
            hint="merge it (`merge_and_unload()` of peft, `fuse_lora()` and "
            "`unload_lora_weights()` of diffusers) and save the model again",
        )


def fill(
    module: nn.Module,
    what: str,
    find: Callable[[str], tuple[Weights, str | Place]],
    *,
    read: bool = True,
    adapt: Callable[[str, LazyTensor], LazyTensor] = lambda name, source: source,
) -> None:
    """Give every tensor of a module on the meta device its source.

    Args:
        what: how errors call the module.
        find: a parameter's name -> the folder that should hold it, and its key or place there.
        read: whether to read them all at once, in float32. Otherwise the module stays on the meta
            device; names and shapes are checked.
        adapt: a parameter's name and its source -> the source that it gets.

    Raises:
        CheckpointError: listing every tensor that is missing or has another shape.
    """
    # tied parameters have two names and one key: both get the one tensor that is read
    parameters = dict(module.named_parameters(remove_duplicate=False))
    wanted = {**parameters, **dict(_persistent_buffers(module))}
    places = {name: _placed(*find(name)) for name in wanted}
    missing: dict[str, Weights] = {}
    misshapen: dict[str, Weights] = {}
    for name, parameter in wanted.items():
        weights, place = places[name]
        expected = place.stored_shape(parameter.shape)
        if place.key not in weights:
            missing[f"{place.key} {expected} in {weights.folder}"] = weights
        elif (entry := weights.entries[place.key]).gives is None:
            raise unreadable(place.key, entry)
        elif (shape := list(entry.shape)) != expected:
            misshapen[f"{place.key}: expected {expected}, found {shape}"] = weights
    if missing:
        first, weights = next(iter(missing.items()))
        raise CheckpointError(
            f"{what}: missing tensors: {listed(list(missing))}",
            hint=_wrapped(weights, first.split(" ")[0]),
        )
    if misshapen:
        folder = next(iter(misshapen.values())).folder
        raise CheckpointError(
            f"{what}: tensors of a wrong shape in {folder}: {listed(list(misshapen))}",
            hint="the weights do not belong to the config.json beside them",
        )
    for name, (weights, place) in places.items():
        rows = None if place.rows is None else place.rows[:2]
        prefix, _, leaf = name.rpartition(".")
        source = place.take(weights.source(place.key, rows))
        lazy_tensors.attach(module.get_submodule(prefix), leaf, adapt(name, source))
    if read:
        lazy_tensors.load(module)
    module.eval().requires_grad_(False)


def _placed(weights: Weights, place: str | Place) -> tuple[Weights, Place]:
    return weights, Place(place) if isinstance(place, str) else place


def refuse_unused(weights: Weights, what: str, allowed: Iterable[str] = ()) -> None:
    """Raise for tensors that no module took.

    Raises:
        CheckpointError: naming them.
    """
    if unused := weights.unused(allowed):
        raise CheckpointError(
            f"{what}: unexpected tensors in {weights.folder}: {listed(unused)}",
            hint="the checkpoint is of a variant that is not supported, or of another model",
        )


def _wrapped(weights: Weights, key: str) -> str | None:
    """Say why a tensor is missing that is there under a longer name."""
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


def listed(names: Sequence[str], limit: int = 12) -> str:
    """Name the first of many in an error."""
    rest = f" … and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest
