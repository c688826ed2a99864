"""`denoise`: one denoising step: ControlNet, transformer and the move of the latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import IMAGES, STEPS
from bifrost_rt.manifest import State, TensorSpec
from export.stages import Definition, Stage, conditioning, control_embed

if TYPE_CHECKING:
    from export.model.denoising import Denoise

_SUMS = "writes the ControlNet's residual sums"

DEFINITION = Definition(
    "denoise",
    tolerance=1e-4,
    # latents enter a step and velocities leave it
    float32_layers=("controlnet_x_embedder.", "transformer_x_embedder.", "proj_out."),
    not_quantized={
        "*_x_embedder": "an embedder: few weights, and all later layers see its error",
        "proj_out": "the final projection writes the velocity itself",
        "residuals.*": _SUMS,
        "single_residuals.*": _SUMS,
    },
    residuals=("residuals", "single_residuals"),
)


def stage(module: Denoise, inner: int, text_tokens: int, modulation: int) -> Stage:
    """latents [B, 4N, C] -> latents [B, 4N, C]"""
    image_tokens = module.transformer_cos.shape[0] - text_tokens
    latents = (IMAGES, image_tokens, module.transformer_x_embedder.in_features)
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(
            TensorSpec("latents", "float32", latents),
            TensorSpec("velocity", "float32", latents),
            TensorSpec("step", "int64", (1,)),
            TensorSpec("step_weights", "float32", (STEPS, 2)),
            TensorSpec("controlnet_conditioning_scale", "float32", (1,)),
            *control_embed.output_specs(inner, image_tokens),
            *conditioning.output_specs(inner, text_tokens, modulation),
        ),
        outputs=(
            TensorSpec("next_latents", "float32", latents),
            TensorSpec("next_velocity", "float32", latents),
            TensorSpec("next_step", "int64", (1,)),
        ),
        state=(
            State("next_latents", "latents"),
            State("next_velocity", "velocity"),
            State("next_step", "step"),
        ),
    )
