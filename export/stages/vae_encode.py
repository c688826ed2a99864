"""`vae_encode`: pixels -> packed latents, with scaling and packing inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import SOURCES
from bifrost_rt.manifest import TensorSpec
from export.stages import Definition, Stage

if TYPE_CHECKING:
    from export.model.vae import VaeEncode

DEFINITION = Definition(
    "vae_encode",
    tolerance=1e-4,
    float32_layers=("vae.encoder.conv_in.", "vae.encoder.conv_out."),  # pixels in, latents out
    not_quantized={
        "*": "convolutions whose result is kept pixel by pixel; they run once per image",
    },
)


def stage(module: VaeEncode) -> Stage:
    """uint8 [B, H, W, 3] -> latents [B, side², 4C]"""
    config, side = module.vae.config, module.side
    pixels = 2 * side * 2 ** (len(config.block_out_channels) - 1)
    channels = 4 * config.latent_channels
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(TensorSpec("pixels", "uint8", (SOURCES, pixels, pixels, 3)),),
        outputs=(TensorSpec("known_latents", "float32", (SOURCES, side * side, channels)),),
    )
