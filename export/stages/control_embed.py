"""`control_embed`: CLIP latents -> the ControlNet's condition, the same at every denoising step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import IMAGES
from bifrost_rt.manifest import TensorSpec
from export.stages import Definition, Stage

if TYPE_CHECKING:
    from export.model.conditioning import ControlEmbed

DEFINITION = Definition(
    "control_embed",
    tolerance=1e-4,
    not_quantized={
        "*": "it runs once per image, and every block of every step sees what it gives",
    },
)


def output_specs(inner: int, image_tokens: int) -> tuple[TensorSpec, ...]:
    """Return what every denoising step reads of the tokens."""
    return (TensorSpec("control_condition", "float32", (IMAGES, image_tokens, inner)),)


def stage(module: ControlEmbed, num_tokens: int, hidden: int) -> Stage:
    """tokens [B, N, D] -> condition [B, 4N, inner]"""
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(TensorSpec("tokens", "float32", (IMAGES, num_tokens, hidden)),),
        outputs=output_specs(module.controlnet_x_embedder.out_features, 4 * num_tokens),
    )
