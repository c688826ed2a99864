"""Recorded runs of the official implementation: what a set of that checkpoint must reproduce."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file


@dataclass(frozen=True)
class Case:
    """One recorded run."""

    name: str
    facts: dict[str, Any]
    tensors: dict[str, NDArray[Any]]

    def request(self) -> dict[str, Any]:
        """Return the arguments of `Generator.run` that repeat it."""
        f = self.facts
        return {
            "prompt": f["prompts"],
            "order": self.tensors["mllm.orders"],
            "latents": self.tensors["flux.latents_init"],
            "decoding_steps": f["num_iter"],
            "cfg_weight": f["cfg"],
            "num_inference_steps": f["num_inference_steps"],
            "guidance_scale": f["guidance_scale"],
            "controlnet_conditioning_scale": f["controlnet_conditioning_scale"],
        }


def names(folder: Path) -> list[str]:
    """Return the cases that a folder of recordings has."""
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return [str(case["file"]).removesuffix(".safetensors") for case in cases]


def load(folder: Path, name: str) -> Case:
    """One of them."""
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    facts = next(case for case in cases if case["file"] == f"{name}.safetensors")
    return Case(name, facts, load_file(folder / f"{name}.safetensors"))
