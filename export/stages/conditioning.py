"""`conditioning`: what every denoising step takes from the prompt, for all steps at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bifrost_rt.dims import IMAGES, PROMPTS, STEPS
from bifrost_rt.manifest import TensorSpec
from export.stages import Definition, Stage

if TYPE_CHECKING:
    from export.model.conditioning import Conditioning

DEFINITION = Definition(
    "conditioning",
    tolerance=1e-4,
    # timesteps reach 1000 as phases of sines
    float32_layers=("controlnet_embedding.", "transformer_embedding."),
    not_quantized={
        "*": "embedders and modulation run once per image, and every block of every step "
        "multiplies with what they give",
    },
    # more than a fifth of the release's weights in 16 bit, each read once per image
    when_short=("controlnet_modulation.*", "transformer_modulation.*"),
)


def output_specs(inner: int, text_tokens: int, modulation: int) -> tuple[TensorSpec, ...]:
    """Return what every denoising step reads of the prompt."""
    return (
        TensorSpec("controlnet_context", "float32", (IMAGES, text_tokens, inner)),
        TensorSpec("transformer_context", "float32", (IMAGES, text_tokens, inner)),
        TensorSpec("modulation", "float32", (STEPS, IMAGES, modulation)),
    )


def stage(module: Conditioning, text_tokens: int) -> Stage:
    """prompt embeddings, timesteps -> contexts, modulations"""
    context = module.transformer_context_embedder
    pooled = module.transformer_embedding.embed.text_embedder.linear_1.in_features
    guided = module.controlnet_embedding.guided or module.transformer_embedding.guided
    return Stage(
        definition=DEFINITION,
        module=module,
        inputs=(
            TensorSpec("prompt_embeds", "float32", (PROMPTS, text_tokens, context.in_features)),
            TensorSpec("pooled_prompt_embeds", "float32", (PROMPTS, pooled)),
            TensorSpec("prompt_index", "int64", (IMAGES,)),
            TensorSpec("timesteps", "float32", (STEPS,)),
            *([TensorSpec("guidance_scale", "float32", (1,))] if guided else []),
        ),
        outputs=output_specs(
            context.out_features,
            text_tokens,
            module.controlnet_modulation.width + module.transformer_modulation.width,
        ),
        # it alone comes from layers that may be quantized
        compared=("modulation",),
    )
