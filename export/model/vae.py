"""The VAE between FLUX's packed latents and an image file's bytes, with scaling inside."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn


class _Vae(nn.Module):
    """One half of a VAE.

    Args:
        side: of the grid of packed latents.
    """

    def __init__(self, vae: AutoencoderKL, side: int) -> None:
        super().__init__()
        self.vae = vae
        self.side = side
        self.scaling_factor = vae.config.scaling_factor
        self.shift_factor = vae.config.shift_factor or 0.0

    @property
    def image_side(self) -> int:
        """Pixels of an image's side."""
        halvings: int = len(self.vae.config.block_out_channels) - 1
        return 2 * self.side * 2**halvings

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Of an image's packed latents, side² and 4C."""
        return self.side**2, 4 * self.vae.config.latent_channels


class VaeDecode(_Vae):
    """The decoder, with rounding to bytes."""

    def sample(self, latents: Tensor) -> Tensor:
        """[B, side², 4C] -> [B, 3, H, W], not clamped"""
        x = latents.unflatten(1, (self.side, self.side)).unflatten(3, (-1, 2, 2))
        x = x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [B, C, 2 side, 2 side]
        return self.vae.decode(x / self.scaling_factor + self.shift_factor, return_dict=False)[0]

    def forward(self, latents: Tensor) -> Tensor:
        pixels = torch.round((self.sample(latents) / 2 + 0.5).clamp(0, 1) * 255)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)


class VaeEncode(_Vae):
    """The encoder. An image's latents are the mean of the distribution that it gives.

    Source: diffusers' FluxInpaintPipeline (`_encode_vae_image`, `_pack_latents`).
    """

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.to(torch.float32).permute(0, 3, 1, 2) / 127.5 - 1  # TensorRT casts bytes alone
        mean = self.vae.encode(x, return_dict=False)[0].mode()
        z = (mean - self.shift_factor) * self.scaling_factor  # [B, C, 2 side, 2 side]
        z = z.unflatten(3, (self.side, 2)).unflatten(2, (self.side, 2))
        return z.permute(0, 2, 4, 1, 3, 5).flatten(3, 5).flatten(1, 2)
