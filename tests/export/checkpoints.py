"""What tests of odd checkpoints share: how a folder is changed, and what is read of it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from export import assemble, lazy_tensors, tokenizer_files
from export.checkpoint import Checkpoint

PARTS = ("mllm", "bifrost", "flux")
DIFFUSERS = "diffusion_pytorch_model"


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON file; `...` removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard(
    folder: Path,
    stem: str,
    names: str = "{stem}-{i:05d}-of-00002.safetensors",
    index: str | None = "{stem}.safetensors.index.json",
) -> Path | None:
    """Cut `{stem}.safetensors` into two; returns the index."""
    tensors = load_file(folder / f"{stem}.safetensors")
    (folder / f"{stem}.safetensors").unlink()
    weight_map = {}
    for i in (1, 2):
        name = names.format(stem=stem, i=i)
        part = {key: tensors[key] for key in sorted(tensors)[i - 1 :: 2]}
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    if index is None:
        return None
    path = folder / index.format(stem=stem)
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def opened(root: Path, **folders: Path) -> Checkpoint:
    """The checkpoint below `root`; `folders` stand elsewhere."""
    return Checkpoint(*(folders.get(part, root / part) for part in PARTS), read=False)


def outline(checkpoint: Checkpoint) -> dict[str, Any]:
    """All that a build makes of a checkpoint before anything is traced: facts, tokenizers and the
    values of every tensor of every stage."""
    model = assemble.facts(checkpoint)
    length = checkpoint.max_seq_length
    with tempfile.TemporaryDirectory() as temporary:
        written = tokenizer_files.write(checkpoint, Path(temporary), length, 16)
        tokenizers = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(Path(temporary).rglob("*.json"))
        }
    found = {"model": model, "scheduler": checkpoint.scheduler, "text": written}
    found["tokenizers"] = tokenizers
    for stage in assemble.stages(checkpoint, model, length, written.clip.max_length, 16):
        found[stage.name] = (str(stage.module), stage.inputs, stage.outputs)
        found[f"{stage.name} tensors"] = {
            name: lazy_tensors.held(source.read()).identity
            for name, source in lazy_tensors.named(stage.module).items()
        }
    return found
