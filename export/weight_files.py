"""Which safetensors files of a folder are its model: under the names that diffusers, transformers
and people give them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from export import foreign
from export.configs import read_json, show
from export.errors import CheckpointError

# What other tools leave in a checkpoint folder. Not read: pickles can run code when they are
# opened, FSDP shards are training state, and adapters change another model.
FOREIGN = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.gguf", "pytorch_model_fsdp*")
ADAPTERS = ("adapter_model*", "adapter_config.json", "pytorch_lora_weights*")


@dataclass(frozen=True)
class WeightFiles:
    """The files of one model.

    Attributes:
        index: the file that says which shard holds a tensor; None where there is none.
        listed: tensor -> its shard, as the index says.
    """

    files: tuple[Path, ...]
    index: Path | None = None
    listed: dict[str, Path] = field(default_factory=dict)


@dataclass
class _Candidate:
    """What a folder holds of one variant: `fp16` of `model.fp16.safetensors`, "" of the plain."""

    single: Path | None = None
    index: Path | None = None
    shards: dict[int, dict[int, Path]] = field(
        default_factory=dict
    )  # of how many -> number -> file


def find(folder: Path, stems: Sequence[str]) -> WeightFiles:
    """Return the files of the model in `folder`.

    That of the first stem that is there: `{stem}.safetensors`, the shards of
    `{stem}.safetensors.index.json`, or shards without an index; where no file of these names is
    there, those of the one variant, such as `{stem}.fp16.safetensors`.

    Raises:
        CheckpointError: none, several, a shard is missing, or a damaged index.
    """
    for stem in stems:
        found = _candidates(folder, stem)
        if not found:
            continue
        if "" not in found and len(found) > 1:
            raise CheckpointError(
                f"{folder}: holds several variants of {stem}.safetensors: {', '.join(found)}",
                hint="remove all but the one that is to be built",
            )
        return _files(folder, found.get("") or next(iter(found.values())))
    raise _nothing(folder, stems[0])


def ignored(folder: Path) -> tuple[str, ...]:
    """Files beside the weights that are not read, for the report."""
    patterns = (*FOREIGN, *ADAPTERS)
    return tuple(sorted({p.name for pattern in patterns for p in folder.glob(pattern)}))


def _candidates(folder: Path, stem: str) -> dict[str, _Candidate]:
    name, number = re.escape(stem), r"(\d+)-of-(\d+)"
    variant = r"(?:\.(?P<variant>\w+))?"
    patterns = {
        "single": re.compile(rf"{name}{variant}\.safetensors"),
        "index": re.compile(rf"{name}\.safetensors\.index{variant}\.json"),
        # diffusers has put the variant before the number, and behind it
        "shard": re.compile(rf"{name}{variant}-{number}\.safetensors"),
        "old shard": re.compile(rf"{name}-{number}{variant}\.safetensors"),
    }
    found: dict[str, _Candidate] = {}
    for file in sorted(_names(folder)):
        for what, pattern in patterns.items():
            if match := pattern.fullmatch(file):
                candidate = found.setdefault(match["variant"] or "", _Candidate())
                if what == "single":
                    candidate.single = folder / file
                elif what == "index":
                    candidate.index = folder / file
                else:
                    i, n = (int(g) for g in re.findall(number, file)[-1])
                    candidate.shards.setdefault(n, {})[i] = folder / file
                break
    return found


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}") from None


def _files(folder: Path, found: _Candidate) -> WeightFiles:
    if found.single and found.index:
        raise CheckpointError(
            f"{folder}: holds both {found.single.name} and {found.index.name}",
            hint="remove the one that is not the trained model",
        )
    if found.single:
        return WeightFiles((found.single,))
    if found.index:
        return _indexed(folder, found.index)
    if len(found.shards) > 1:
        raise CheckpointError(
            f"{folder}: holds shards of several models: "
            + ", ".join(min(s.values()).name for s in found.shards.values()),
            hint="remove those that are not of the trained model",
        )
    ((number, shards),) = found.shards.items()
    first = 0 if 0 in shards else 1
    if missing := sorted(set(range(first, number + first)) - shards.keys()):
        raise CheckpointError(
            f"{folder}: shard {missing[0]} of {number} is missing beside "
            f"{min(shards.values()).name}",
            hint="copy or download the missing shard",
        )
    return WeightFiles(tuple(shards[i] for i in sorted(shards)))


def _indexed(folder: Path, index: Path) -> WeightFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise CheckpointError(
            f"{index}: not a safetensors index: weight_map is {show(weight_map)}, expected an "
            "object of tensors and their files",
            hint="remove the index: shards are read without it, too",
        )
    for shard in sorted(set(weight_map.values())):
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise CheckpointError(f"{index}: names a file outside its folder: {shard!r}")
        if not os.path.lexists(folder / shard):
            raise CheckpointError(
                f"{folder / shard}: missing; {index.name} lists it",
                hint="copy or download the missing shard",
            )
    listed = {tensor: folder / shard for tensor, shard in weight_map.items()}
    return WeightFiles(tuple(sorted(set(listed.values()))), index, listed)


def _nothing(folder: Path, stem: str) -> CheckpointError:
    expected = f"{folder}: expected {stem}.safetensors or {stem}.safetensors.index.json, found "
    found = ignored(folder)
    others = tuple(sorted(p.name for p in folder.glob("*.safetensors") if p.name not in found))
    adapters = any(p.match(pattern) for pattern in ADAPTERS for p in map(Path, found))
    if adapters and not others:
        return CheckpointError(
            f"{expected}{', '.join(found)}: {foreign.ADAPTER.what}", hint=foreign.ADAPTER.hint
        )
    if others:
        return CheckpointError(
            expected + ", ".join((*found, *others)),
            hint=f"if {others[0]} is the model of this folder, name it {stem}.safetensors",
        )
    return CheckpointError(
        expected + (", ".join(found) or "nothing of the kind"),
        hint=foreign.CONVERT if found else foreign.DOWNLOAD,
    )
