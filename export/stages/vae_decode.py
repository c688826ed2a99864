"""`vae_decode`: packed latents -> pixels, with unpacking, scaling and rounding inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import IMAGES
from bifrost_rt.manifest import TensorSpec
from export.stages import Definition, Stage

if TYPE_CHECKING:
    from export.model.vae import VaeDecode

DEFINITION = Definition(
    "vae_decode",
    tolerance=1.0,  # of 255: float differences of 1e-6 move a rounding now and then
    half_tolerance={"float32": 0.0, "bfloat16": 8.0, "float16": 2.0},  # of 255 too
    # the last convolution makes the pixels
    float32_layers=("vae.decoder.conv_in.", "vae.decoder.conv_out."),
    not_quantized={
        "*": "convolutions between the latents and the pixels: nothing after them averages their "
        "error away, and they are a hundredth of the weights",
    },
)


def stage(module: VaeDecode) -> Stage:
    """latents [B, side², 4C] -> uint8 [B, H, W, 3]"""
    side = module.image_side
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(TensorSpec("latents", "float32", (IMAGES, *module.packed_shape)),),
        outputs=(TensorSpec("images", "uint8", (IMAGES, side, side, 3)),),
    )
