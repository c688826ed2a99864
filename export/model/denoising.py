"""One denoising step: ControlNet, transformer and the move of the latents."""

from __future__ import annotations

import math

from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from export.model.controlnet import LatentControlNet
from export.model.modulation import rotary_table


class Denoise(nn.Module):
    """Both networks after `hoist`: their blocks read the packed modulation row of the step.

    The loop over blocks follows the stock forward of diffusers' FluxControlNetModel and
    FluxTransformer2DModel, without the embeddings that do not change in the loop.
    """

    def __init__(
        self,
        controlnet: LatentControlNet,
        controlnet_width: int,
        transformer: FluxTransformer2DModel,
        text_tokens: int,
        side: int,
    ) -> None:
        super().__init__()
        self.controlnet_width = controlnet_width
        for prefix, net in (("controlnet", controlnet), ("transformer", transformer)):
            setattr(self, f"{prefix}_x_embedder", net.x_embedder)
            setattr(self, f"{prefix}_blocks", net.transformer_blocks)
            setattr(self, f"{prefix}_single_blocks", net.single_transformer_blocks)
            cos, sin = rotary_table(net, text_tokens, side)
            self.register_buffer(f"{prefix}_cos", cos)
            self.register_buffer(f"{prefix}_sin", sin)
        self.residuals = controlnet.controlnet_blocks
        self.single_residuals = controlnet.controlnet_single_blocks
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out

    def forward(
        self,
        latents: Tensor,
        velocity: Tensor,
        step: Tensor,
        step_weights: Tensor,
        controlnet_conditioning_scale: Tensor,
        control_condition: Tensor,
        controlnet_context: Tensor,
        transformer_context: Tensor,
        modulation: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`velocity` is that of the computed step before; an Euler step gives it no weight."""
        row = modulation.index_select(0, step).squeeze(0)  # [B, both networks' widths]
        samples, single_samples = self._controlnet(
            latents, control_condition, controlnet_context, row[:, : self.controlnet_width]
        )
        scale = controlnet_conditioning_scale
        found = self._transformer(
            latents,
            transformer_context,
            row[:, self.controlnet_width :],
            [sample * scale for sample in samples],
            [sample * scale for sample in single_samples],
        )
        now, before = step_weights.index_select(0, step).unbind(1)
        return latents + (now * found + before * velocity), found, step + 1

    def _controlnet(
        self, latents: Tensor, condition: Tensor, context: Tensor, row: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        rope = (self.controlnet_cos, self.controlnet_sin)
        x = self.controlnet_x_embedder(latents) + condition
        samples, single_samples = [], []
        for block, residual in zip(self.controlnet_blocks, self.residuals, strict=True):
            context, x = block(
                hidden_states=x, encoder_hidden_states=context, temb=row, image_rotary_emb=rope
            )
            samples.append(residual(x))
        for block, residual in zip(
            self.controlnet_single_blocks, self.single_residuals, strict=True
        ):
            context, x = block(
                hidden_states=x, encoder_hidden_states=context, temb=row, image_rotary_emb=rope
            )
            single_samples.append(residual(x))
        return samples, single_samples

    def _transformer(
        self,
        latents: Tensor,
        context: Tensor,
        row: Tensor,
        samples: list[Tensor],
        single_samples: list[Tensor],
    ) -> Tensor:
        rope = (self.transformer_cos, self.transformer_sin)
        x = self.transformer_x_embedder(latents)
        for blocks, residuals in (
            (self.transformer_blocks, samples),
            (self.transformer_single_blocks, single_samples),
        ):
            # block i of L gets residual i // ceil(L / n): diffusers spreads n over L this way
            every = math.ceil(len(blocks) / len(residuals)) if residuals else 0
            for i, block in enumerate(blocks):
                context, x = block(
                    hidden_states=x, encoder_hidden_states=context, temb=row, image_rotary_emb=rope
                )
                if every:
                    x = x + residuals[i // every]
        return self.proj_out(self.norm_out(x, row))
