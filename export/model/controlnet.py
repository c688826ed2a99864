"""The latent ControlNet: diffusers' FluxControlNet fed with patch-level CLIP latents.

Source: arXiv 2508.05954, section 3.3. Bifrost-1 changes one thing: the control condition is not an
image but the token grid, up-sampled twofold and projected from the MLLM's width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.controlnets.controlnet_flux import FluxControlNetModel
from torch import Tensor, nn

from export import lazy_tensors


class ScaleShift(nn.Module):
    """What a batch norm does in eval mode."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        shape = (norm.num_features, 1, 1)
        parts = [
            lazy_tensors.of(norm, n) for n in ("weight", "bias", "running_mean", "running_var")
        ]

        def scale(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return (weight.float() / torch.sqrt(var.float() + norm.eps)).reshape(shape)

        def shift(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            scaled = mean.float().reshape(shape) * scale(weight, bias, mean, var)
            return bias.float().reshape(shape) - scaled

        for name, change in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.empty(shape, device="meta"))
            what = f"{name} of a batch norm, {norm.eps}"
            lazy_tensors.attach(self, name, lazy_tensors.join(what, parts, change, shape=shape))
        if not norm.weight.is_meta:
            lazy_tensors.load(self)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]"""
        return x * self.scale + self.shift


class UpSamplingBlock(nn.Module):
    """Token grid ×2: a learned path plus the nearest-neighbour one. Batch norms in eval mode."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upconv = nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] on a square grid, row by row -> [B, 4N, D]"""
        side = int(tokens.shape[1] ** 0.5)
        x = tokens.transpose(1, 2).unflatten(2, (side, side))  # [B, D, h, w]
        # stated as a broadcast: `interpolate` exports a Resize that some parsers refuse
        near = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2).flatten(4, 5).flatten(2, 3)
        x = F.relu(self.bn1(self.upconv(x)))
        x = F.relu(self.bn2(self.conv(x)) + near)
        return x.flatten(2).transpose(1, 2)

    def spell_out_norms(self) -> None:
        """Put a scale and a shift in the place of each batch norm, once.

        The exporter folds a batch norm into the convolution before it, and the product of a 16-bit
        weight with anything is not 16 bit any more: a third of a gigabyte at the release's width.
        """
        if isinstance(self.bn1, nn.BatchNorm2d):
            self.bn1, self.bn2 = ScaleShift(self.bn1), ScaleShift(self.bn2)


class LatentControlNet(FluxControlNetModel):
    """FluxControlNet whose condition is `tokens` [B, N, D]; `controlnet_cond` of the stock forward
    is `up_sampling_block(tokens)` [B, 4N, D]."""

    def __init__(self, cond_dim: int, **config: Any) -> None:
        super().__init__(**config)
        self.up_sampling_block = UpSamplingBlock(cond_dim)
        self.controlnet_x_embedder = nn.Linear(cond_dim, self.inner_dim)
