"""FLUX without what the denoising loop does not change.

Every adaptive layer norm projects the timestep embedding with a linear layer of its own: 3.25 of
FLUX.1-dev's 11.9 billion parameters, and the same result for every image row. `hoist` takes these
layers out of a network; the network then reads their outputs from one packed row per step. Nothing
else of diffusers' blocks is touched, so they stay exactly the stock mathematics.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
)
from torch import Tensor, nn

Network: TypeAlias = FluxTransformer2DModel | FluxControlNetModel


class Modulation(nn.Module):
    """All modulation layers of a network: the embedding of a step -> one packed row.

    The row's order is the order in which the network's norms were found; `Slice` reads it back.
    """

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(linears)
        self.width = sum(linear.out_features for linear in linears)

    def forward(self, temb: Tensor) -> Tensor:
        """[..., inner] -> [..., width]"""
        activated = nn.functional.silu(temb)
        return torch.cat([linear(activated) for linear in self.linears], dim=-1)


class Slice(nn.Module):
    """Stands where a modulation layer stood: its columns of the packed row."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, packed: Tensor) -> Tensor:
        """[B, width] -> [B, stop - start]"""
        return packed[:, self.start : self.stop]


def precompute_modulation(network: Network) -> Modulation:
    """Take the modulation layers out of `network`, in place, and return them.

    Afterwards the network's blocks expect a packed row [B, width] in place of `temb`.
    """
    linears: list[nn.Linear] = []
    width = 0
    for module in network.modules():
        if isinstance(module, (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous)):
            linear = module.linear
            linears.append(linear)
            module.linear = Slice(width, width + linear.out_features)
            module.silu = nn.Identity()
            width += linear.out_features
    return Modulation(linears)


class StepEmbedding(nn.Module):
    """A network's `time_text_embed`, split by what its parts depend on."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.embed = network.time_text_embed
        self.guided = hasattr(self.embed, "guidance_embedder")
        # A constant made by torch: timesteps reach 1000 and guidance 3500, so one unit in the last
        # place of a frequency, as another library's exp rounds it, is a phase of 1e-4.
        half = self.embed.time_proj.num_channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / half
        self.register_buffer("frequencies", exponent.exp())

    def forward(
        self, timesteps: Tensor, guidance_scale: Tensor | None, pooled_prompt_embeds: Tensor
    ) -> Tensor:
        """timesteps [T] (0…1000), guidance [1], pooled [P, E] -> [T, P, inner]"""
        embed = self.embed
        temb = embed.timestep_embedder(self._sinusoids(timesteps))
        if self.guided:
            assert guidance_scale is not None
            temb = temb + embed.guidance_embedder(self._sinusoids(guidance_scale * 1000))
        return temb[:, None] + embed.text_embedder(pooled_prompt_embeds)[None]

    def _sinusoids(self, x: Tensor) -> Tensor:
        angles = x[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_table(network: Network, text_tokens: int, side: int) -> tuple[Tensor, Tensor]:
    """cos and sin over [text, image]: text positions are 0, image positions (0, row, column)."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    ids = torch.cat([torch.zeros(text_tokens, 3), image.float()])
    cos, sin = network.pos_embed(ids)
    return cos, sin
