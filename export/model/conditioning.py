"""All that no denoising step changes: what follows from the prompt, and what from the tokens."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from export.model.controlnet import LatentControlNet
from export.model.modulation import Modulation, StepEmbedding


class ControlEmbed(nn.Module):
    """What the ControlNet makes of the tokens before its first block."""

    def __init__(self, controlnet: LatentControlNet) -> None:
        super().__init__()
        controlnet.up_sampling_block.spell_out_norms()
        self.up_sampling_block = controlnet.up_sampling_block
        self.controlnet_x_embedder = controlnet.controlnet_x_embedder

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, N, D] -> condition [B, 4N, inner]"""
        condition: Tensor = self.controlnet_x_embedder(self.up_sampling_block(tokens))
        return condition


class Conditioning(nn.Module):
    """Context of both networks, and every modulation of every step."""

    def __init__(
        self,
        controlnet: LatentControlNet,
        controlnet_modulation: Modulation,
        transformer: FluxTransformer2DModel,
        transformer_modulation: Modulation,
    ) -> None:
        super().__init__()
        self.controlnet_context_embedder = controlnet.context_embedder
        self.transformer_context_embedder = transformer.context_embedder
        self.controlnet_embedding = StepEmbedding(controlnet)
        self.transformer_embedding = StepEmbedding(transformer)
        self.controlnet_modulation = controlnet_modulation
        self.transformer_modulation = transformer_modulation

    def forward(
        self,
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
            self.controlnet_context_embedder(prompt_embeds).index_select(0, prompt_index),
            self.transformer_context_embedder(prompt_embeds).index_select(0, prompt_index),
            torch.cat(rows, dim=-1),
        )
