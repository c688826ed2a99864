"""The options that name a checkpoint: `export.build` and `export.plan` have the same."""

from __future__ import annotations

import argparse
from typing import Any

from export import hub, lora_files
from export.recipe import CHECKPOINT, FILES

ON_THE_HUB = tuple(name for name in FILES if name != "flux_configs")


def add(parser: argparse.ArgumentParser) -> None:
    """Add them to a command line."""
    parser.add_argument(
        "--mllm",
        metavar="DIR",
        help="the Qwen2.5-VL folder; this and the next two also as a model of the Hugging Face "
        "hub, org/name or org/name@revision, which is looked up in the local cache",
    )
    parser.add_argument("--bifrost", metavar="DIR", help="the trained Bifrost-1 folder")
    parser.add_argument(
        "--flux",
        metavar="PATH",
        help="the diffusers FLUX pipeline folder, or a single file; files also as those of a model "
        "of the hub, org/name/file",
    )
    parser.add_argument("--vae", metavar="FILE", help="in the place of flux's: ae.safetensors")
    parser.add_argument("--clip", metavar="FILE", help="in the place of flux's: clip_l.safetensors")
    parser.add_argument(
        "--t5", metavar="FILE", help="in the place of flux's: t5xxl_fp16.safetensors, or a GGUF"
    )
    parser.add_argument(
        "--flux-configs",
        metavar="DIR",
        help="beside a single file: a folder with tokenizer/ and tokenizer_2/, and configs",
    )
    parser.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="add a LoRA of FLUX or its text encoders to the weights, as diffusers, peft and kohya "
        "write it; several times for several",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch from the hub what the cache lacks; nothing is fetched without it",
    )


def read(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was given, as a recipe has it: models and files of the hub are paths.

    Raises:
        CheckpointError: the cache lacks a model or a file, or it cannot be fetched.
        RecipeError: a LoRA that is none, or a scale that is no number.
    """
    names = (*CHECKPOINT, *FILES, "lora")
    flags = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    for part in CHECKPOINT:
        if part in flags:
            flags[part] = str(hub.find(flags[part], part, download=options.download))
    for name in ON_THE_HUB:
        if name in flags:
            flags[name] = str(hub.find_file(flags[name], download=options.download))
    if "lora" in flags:
        files = [lora_files.parse(text) for text in flags["lora"]]
        flags["lora"] = [
            f"{hub.find_file(str(file.path), download=options.download)}:{file.scale!r}"
            for file in files
        ]
    return flags
