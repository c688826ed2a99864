"""The VAE's decoder alone, on whole scenes: latents stay as they are, images get sharper.

The VAE stage decodes samples of a wide posterior, which is what makes its latents easy to model
and its edges soft. What the diffusion model draws lies close to the posterior's centre, so the
decoder ends on latents with little noise, while everything that was learnt on them stays valid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.config import Config
from training.loop import load_weights
from training.vae import to_pixels, trained_vae, whole_scene

NOISE = 0.5  # upper end of the noise, in posterior deviations
EDGE_WEIGHT = 3.0  # added to 1 at and around objects


class DecoderStage:
    """Absolute error, mostly: it prefers a sharp edge to an averaged one."""

    name = "decoder"

    def __init__(self, config: Config, out: Path) -> None:
        self.vae = trained_vae(config, out)
        self.module = self.vae.decoder.requires_grad_(True)

    def loss(self, step: int, batch: int, rng: np.random.Generator) -> Tensor:
        """Weighted error of the pixels."""
        pixels = to_pixels([whole_scene(rng) for _ in range(batch)])
        ground = pixels[..., :1, :1]
        weight = 1 + EDGE_WEIGHT * ((pixels - ground).abs().amax(1, keepdim=True) > 0.1)
        weight = torch.nn.functional.max_pool2d(weight, 7, stride=1, padding=3)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            with torch.no_grad():
                posterior = self.vae.encode(pixels).latent_dist
            spread = NOISE * torch.rand(batch, 1, 1, 1) * posterior.std
            output = self.module(posterior.mode() + spread * torch.randn_like(spread))
        error = output.float() - pixels
        return (weight * (error.abs() + 0.5 * error.square())).mean()


def finished_vae(config: Config, out: Path) -> AutoencoderKL:
    """Return the VAE with its sharpened decoder, in eval mode."""
    vae = trained_vae(config, out)
    load_weights(vae.decoder, out, "decoder")
    return vae
