"""The two networks as diffusers has them, as one module: what peers run or convert."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.peers.stock_files import CHECKPOINT, GUIDANCE, INPUTS, TIME

NAMES = ("latents", "controlnet_cond", "prompt_embeds", "pooled_prompt_embeds")


class Step(nn.Module):
    """ControlNet and transformer of one step, each with the stock forward."""

    def __init__(self, folder: Path, dtype: torch.dtype, image_tokens: int, text: int) -> None:
        super().__init__()
        checkpoint = folder / CHECKPOINT
        self.controlnet = _controlnet(checkpoint / "bifrost" / "flux_controlnet")
        self.transformer = FluxTransformer2DModel.from_pretrained(
            checkpoint / "flux" / "transformer"
        )
        self.to(dtype).eval().requires_grad_(False)
        side = math.isqrt(image_tokens)
        places = torch.zeros(side, side, 3)
        places[..., 1] += torch.arange(side)[:, None]
        places[..., 2] += torch.arange(side)[None, :]
        self.register_buffer("image_places", places.reshape(-1, 3))
        self.register_buffer("text_places", torch.zeros(text, 3))

    def forward(self, latents: Tensor, condition: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        """Return the velocity [1, S, C]."""
        n, dtype = latents.shape[0], latents.dtype
        shared = {
            "hidden_states": latents,
            "encoder_hidden_states": embeds,
            "pooled_projections": pooled,
            "timestep": torch.full([n], TIME, dtype=dtype),
            "guidance": torch.full([n], GUIDANCE, dtype=dtype),
            "img_ids": self.image_places,
            "txt_ids": self.text_places,
            "return_dict": False,
        }
        samples, single_samples = self.controlnet(
            controlnet_cond=condition, conditioning_scale=1.0, **shared
        )
        (velocity,) = self.transformer(
            controlnet_block_samples=samples,
            controlnet_single_block_samples=single_samples,
            **shared,
        )
        return velocity


def _controlnet(folder: Path) -> nn.Module:
    """Return the stock ControlNet; the width of what it is conditioned on is the tokens'."""
    config = json.loads((folder / "config.json").read_text())
    width = config.pop("input_cond_dim")
    network = FluxControlNetModel.from_config(config)
    network.controlnet_x_embedder = nn.Linear(width, network.inner_dim)
    tensors = {
        name: value.float()
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
        if not name.startswith("up_sampling_block.")
    }
    network.load_state_dict(tensors)
    return network


def inputs(folder: Path) -> list[NDArray[Any]]:
    """Return what `Step` is called with."""
    found = np.load(folder / INPUTS)
    return [found[name] for name in NAMES]


def step(folder: Path, dtype: torch.dtype) -> Step:
    """Return the module for the inputs of a folder."""
    latents, _, embeds, _ = inputs(folder)
    return Step(folder, dtype, latents.shape[1], embeds.shape[1])
