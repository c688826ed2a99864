"""The autoencoder: learns edges on dense crops first, then whole scenes.

On whole scenes alone it settles on flat backgrounds and blurs every shape.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from scenes.layout import SIDE, place, scatter
from scenes.render import render
from scenes.sampling import training_spec
from scenes.world import BACKGROUNDS
from training.config import Config
from training.loop import load_weights

CROP = 64  # px
CROP_SHARE = 0.6  # of the steps
KL_WEIGHT = 3e-5
OBJECT_WEIGHT = 4.0  # added to 1, so that small shapes count beside large backgrounds


def build_vae(config: Config) -> AutoencoderKL:
    """With random weights."""
    depth = len(config.vae_channels)
    return AutoencoderKL(
        block_out_channels=config.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=SIDE,
    )


def to_pixels(images: list[NDArray[np.uint8]]) -> Tensor:
    """uint8 images to float [B, 3, H, W] in -1…1."""
    stacked = torch.as_tensor(np.stack(images))
    return stacked.permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def random_background(rng: np.random.Generator) -> str:
    """Any of the world's backgrounds."""
    return tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]


def _crop(rng: np.random.Generator) -> NDArray[np.uint8]:
    image = render(scatter(rng, int(rng.integers(5, 9))), random_background(rng))
    top, left = rng.integers(0, SIDE - CROP + 1, 2)
    return image[top : top + CROP, left : left + CROP]


def whole_scene(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Return an image of a prompt's scene, or of objects anywhere."""
    if rng.random() < 0.3:
        return render(scatter(rng, int(rng.integers(1, 5))), random_background(rng))
    spec = training_spec(rng)
    return render(place(spec, rng), spec.drawn_background)


class VaeStage:
    """Dense crops, then whole scenes."""

    name = "vae"

    def __init__(self, config: Config, out: Path) -> None:
        self.module = build_vae(config)
        self.crops_until = int(CROP_SHARE * config.schedules["vae"].steps)

    def loss(self, step: int, batch: int, rng: np.random.Generator) -> Tensor:
        """Weighted fit of the pixels, and a little KL."""
        if step < self.crops_until:
            pixels = to_pixels([_crop(rng) for _ in range(batch)])
        else:
            pixels = to_pixels([whole_scene(rng) for _ in range(max(1, batch // 3))])
        ground = pixels.flatten(2).mode(dim=2).values[..., None, None]
        weight = 1 + OBJECT_WEIGHT * ((pixels - ground).abs().amax(1, keepdim=True) > 0.1)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            posterior = self.module.encode(pixels).latent_dist
            output = self.module.decode(posterior.sample()).sample
        error = output.float() - pixels
        fit = (weight * (error.square() + 0.2 * error.abs())).mean()
        return fit + KL_WEIGHT * posterior.kl().mean()


def trained_vae(config: Config, out: Path) -> AutoencoderKL:
    """In eval mode."""
    vae = build_vae(config)
    load_weights(vae, out, "vae")
    return vae.eval().requires_grad_(False)
