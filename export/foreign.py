"""What a file or a folder really is where a checkpoint was expected: download left-overs, other
formats, other folders. Each is named, with what to do about it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

HEAD = 1024  # bytes that tell what a file is
DOWNLOAD = "download it again, for example with `hf download`"
INCOMPLETE = "the folder is not complete: copy or download it again"
CONVERT = (
    "convert it to safetensors first, for example with "
    "`save_pretrained(..., safe_serialization=True)`; pickles are not opened here"
)
GATED = f"the model may ask to accept its licence and for `hf auth login`; then {DOWNLOAD}"
SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file that it stands for",
        "fetch the file with `git lfs pull`, or with `hf download`",
    ),
    (b"<!doctype html", "a web page", GATED),
    (b"<html", "a web page", GATED),
    (b"<?xml", "an XML document, as servers answer errors", GATED),
    (b"pk\x03\x04", "a zip archive, such as a PyTorch pickle", CONVERT),
    (b"\x80\x02", "a Python pickle", CONVERT),
    (
        b"gguf",
        "a GGUF file",
        "give it alone: --flux, --vae, --clip and --t5 take single files",
    ),
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# A single file of a whole FLUX, as other programs read it.
_SINGLE_FILE = ("*.safetensors", "*.gguf", "*.ckpt", "*.sft")
SINGLE_FILE_ENDINGS = (".safetensors", ".gguf", ".sft")
PIPELINE_PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler")


class Foreign(NamedTuple):
    """What was found, as the end of `... is`, and the hint."""

    what: str
    hint: str


ADAPTER = Foreign(
    "a LoRA adapter without its base model",
    "merge it into its base (`merge_and_unload()` of peft, `fuse_lora()` of diffusers) and save "
    "the whole model",
)
_FLUX_FOLDER = (
    "the flux folder is a diffusers pipeline with model_index.json and the folders "
    f"{', '.join(PIPELINE_PARTS)}, tokenizer and tokenizer_2; "
    "`hf download black-forest-labs/FLUX.1-dev` gets them"
)


def file(path: Path) -> Foreign | None:
    """Return what `path` is, if it cannot be a file of a checkpoint; None for anything else."""
    if path.is_symlink() and not path.exists():
        return Foreign(
            f"a link to {os.readlink(path)}, which is not there",
            "download it again, or copy folders of links with `cp -rL`",
        )
    if path.is_dir():
        return Foreign("a folder, not a file", DOWNLOAD)
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD)
    except OSError:
        return None
    if not head:
        return Foreign("empty", DOWNLOAD)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for signature, what, hint in SIGNATURES:
        if start.startswith(signature):
            return Foreign(what, hint)
    return None


def folder(path: Path, name: str) -> Foreign | None:
    """Return what `path` is, if it cannot be the checkpoint folder `name`: mllm, bifrost or
    flux."""
    if not path.exists():
        return _absent(path, name)
    if not path.is_dir():
        hint = _FLUX_FOLDER if name == "flux" else f"--{name} takes a folder"
        return Foreign("a file, not a folder", hint)
    if (path / "snapshots").is_dir() and not (path / "config.json").exists():
        return Foreign(
            "a model's cache of the Hugging Face hub, not its files",
            f"give the folder of a snapshot: {_snapshots(path)}",
        )
    if _holds(path, name):
        return None
    if _holds(path / name, name):
        return Foreign(f"the folder above: it holds {name}/", f"give {path / name}")
    if name == "flux":
        if (path / "config.json").is_file():
            return Foreign("one network's folder, not a pipeline's", _FLUX_FOLDER)
        single = sorted(f.name for pattern in _SINGLE_FILE for f in path.glob(pattern))
        if single:
            return Foreign(
                f"a folder with a single file of FLUX ({single[0]}), not a pipeline",
                f"give the file itself, --flux {path / single[0]}, and --vae, --clip and --t5",
            )
        return Foreign("not a diffusers pipeline folder", _FLUX_FOLDER)
    if _holds(path, "flux"):
        return Foreign("a diffusers pipeline folder", f"give it as --flux, not as --{name}")
    if (path / "adapter_config.json").exists():
        return ADAPTER
    return None


def _holds(path: Path, name: str) -> bool:
    if name == "flux":
        parts = (*PIPELINE_PARTS, "model_index.json")
        return any(os.path.lexists(path / part) for part in parts)
    return os.path.lexists(path / "config.json")


def _absent(path: Path, name: str) -> Foreign:
    if path.is_symlink():
        return Foreign(
            f"a link to {os.readlink(path)}, which is not there", f"give --{name} another folder"
        )
    # a recipe's paths are below its folder; the id is what stands at the end
    text = re.sub(r"^(https?|hf):/+(huggingface\.co/)?", "", path.as_posix())
    last = "/".join(Path(text).parts[-2:])
    if _HUB_ID.fullmatch(last) and not path.parent.exists():
        return Foreign(
            "no such folder",
            f"if {last} is a model of the Hugging Face hub, download it first, since nothing is "
            f"fetched: `hf download {last} --local-dir FOLDER`; then give that folder as --{name}",
        )
    return Foreign("no such folder", f"give the {name} folder of the checkpoint as --{name}")


def _snapshots(path: Path) -> str:
    main = path / "refs" / "main"
    if main.is_file():
        named = path / "snapshots" / main.read_text(encoding="utf-8", errors="replace").strip()
        if named.is_dir():
            return str(named)
    return ", ".join(str(s) for s in sorted((path / "snapshots").iterdir())) or "none is there"
