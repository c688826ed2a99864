"""The VAE's decoder, with unpacking, scaling and rounding inside."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


class VaeDecode(nn.Module):
    """The decoder between FLUX's packing and an image file's bytes."""

    def __init__(self, vae: AutoencoderKL, side: int) -> None:
        super().__init__()
        self.vae = vae
        self.side = side  # of the grid of packed latents
        self.scaling_factor = vae.config.scaling_factor
        self.shift_factor = vae.config.shift_factor or 0.0

    def sample(self, latents: Tensor) -> Tensor:
        """[B, side², 4C] -> [B, 3, H, W], not clamped"""
        x = latents.unflatten(1, (self.side, self.side)).unflatten(3, (-1, 2, 2))
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, 2 side, 2 side]
        return self.vae.decode(x / self.scaling_factor + self.shift_factor, return_dict=False)[0]

    def forward(self, latents: Tensor) -> Tensor:
        pixels = torch.round((self.sample(latents) / 2 + 0.5).clamp(0, 1) * 255)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)
