"""`vision_encode`: an image's patches -> the tokens that the text branch reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import VISION_TOKENS, WINDOWS
from bifrost_rt.manifest import TensorSpec
from export.stages import Definition, Stage

if TYPE_CHECKING:
    from export.model.vision_tower import VisionTower

DEFINITION = Definition(
    "vision_encode",
    tolerance=1e-4,
    float32_layers=("patch_embed.",),  # pixels enter here
    not_quantized={
        "patch_embed.*": "a hundredth of the weights, and all later layers see its error",
        "merger.*": "it writes the tokens themselves",
    },
)


def stage(module: VisionTower) -> Stage:
    """patches [W, L, …] -> tokens [M, D]"""
    c = module.config
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(
            TensorSpec("patches", "float32", (WINDOWS, c.window_patches, c.patch_values)),
            TensorSpec("positions", "int64", (WINDOWS, c.window_patches, 2)),
            TensorSpec("window_length", "int64", (WINDOWS,)),
            TensorSpec("token_order", "int64", (VISION_TOKENS,)),
        ),
        outputs=(TensorSpec("image_tokens", "float32", (VISION_TOKENS, c.out_hidden_size)),),
    )
