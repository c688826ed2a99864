"""`conditioning`: all that no denoising step changes, for all steps at once."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from bifrost_rt.dims import IMAGES, PROMPTS, STEPS
from bifrost_rt.manifest import TensorSpec
from export.model.controlnet import LatentControlNet
from export.model.hoist import Modulation, StepEmbedding
from export.stages import Stage


class Conditioning(nn.Module):
    """Context of both networks, the ControlNet's condition, and every modulation of every step."""

    def __init__(
        self,
        controlnet: LatentControlNet,
        controlnet_modulation: Modulation,
        transformer: FluxTransformer2DModel,
        transformer_modulation: Modulation,
    ) -> None:
        super().__init__()
        controlnet.up_sampling_block.spell_out_norms()
        self.up_sampling_block = controlnet.up_sampling_block
        self.controlnet_x_embedder = controlnet.controlnet_x_embedder
        self.controlnet_context_embedder = controlnet.context_embedder
        self.transformer_context_embedder = transformer.context_embedder
        self.controlnet_embedding = StepEmbedding(controlnet)
        self.transformer_embedding = StepEmbedding(transformer)
        self.controlnet_modulation = controlnet_modulation
        self.transformer_modulation = transformer_modulation

    def forward(
        self,
        tokens: Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        prompt_index: Tensor,
        timesteps: Tensor,
        guidance_scale: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Prompts are embedded once each; `prompt_index` [B] hands them to the images."""
        rows = []
        for embedding, modulation in (
            (self.controlnet_embedding, self.controlnet_modulation),
            (self.transformer_embedding, self.transformer_modulation),
        ):
            temb = embedding(timesteps, guidance_scale, pooled_prompt_embeds)  # [T, P, inner]
            rows.append(modulation(temb.index_select(1, prompt_index)))
        return (
            self.controlnet_x_embedder(self.up_sampling_block(tokens)),
            self.controlnet_context_embedder(prompt_embeds).index_select(0, prompt_index),
            self.transformer_context_embedder(prompt_embeds).index_select(0, prompt_index),
            torch.cat(rows, dim=-1),
        )


def output_specs(
    inner: int, text_tokens: int, image_tokens: int, modulation: int
) -> tuple[TensorSpec, ...]:
    """What `denoise` reads in every step."""
    return (
        TensorSpec("control_condition", "float32", (IMAGES, image_tokens, inner)),
        TensorSpec("controlnet_context", "float32", (IMAGES, text_tokens, inner)),
        TensorSpec("transformer_context", "float32", (IMAGES, text_tokens, inner)),
        TensorSpec("modulation", "float32", (STEPS, IMAGES, modulation)),
    )


def stage(module: Conditioning, num_tokens: int, hidden: int, text_tokens: int) -> Stage:
    """tokens, prompt embeddings, timesteps -> condition, contexts, modulations"""
    context = module.transformer_context_embedder
    pooled = module.transformer_embedding.embed.text_embedder.linear_1.in_features
    guided = module.controlnet_embedding.guided or module.transformer_embedding.guided
    return Stage(
        name="conditioning",
        module=module,
        inputs=(
            TensorSpec("tokens", "float32", (IMAGES, num_tokens, hidden)),
            TensorSpec("prompt_embeds", "float32", (PROMPTS, text_tokens, context.in_features)),
            TensorSpec("pooled_prompt_embeds", "float32", (PROMPTS, pooled)),
            TensorSpec("prompt_index", "int64", (IMAGES,)),
            TensorSpec("timesteps", "float32", (STEPS,)),
            *([TensorSpec("guidance_scale", "float32", (1,))] if guided else []),
        ),
        outputs=output_specs(
            context.out_features,
            text_tokens,
            4 * num_tokens,
            module.controlnet_modulation.width + module.transformer_modulation.width,
        ),
        tolerance=1e-4,
    )
