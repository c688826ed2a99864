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
    side = module.image_side
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(TensorSpec("pixels", "uint8", (SOURCES, side, side, 3)),),
        outputs=(TensorSpec("known_latents", "float32", (SOURCES, *module.packed_shape)),),
    )
