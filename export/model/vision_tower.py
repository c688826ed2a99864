"""Qwen2.5-VL's vision tower: an image's patches -> the tokens that the text branch reads.

Patches come window by window, and every window is filled up to the same size. So a layer that looks
within windows is one batched attention, and one that looks everywhere is the same attention over
all windows as one row; neither sees what was filled up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import lazy_tensors
from export.model.decoder import rotate
from export.model.vision_config import VisionConfig

EPSILON = 1e-6  # of every norm, whatever the config says of the text branch


class VisionAttention(nn.Module):
    """Projections of one attention, with biases."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = c.num_heads, c.head_dim
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Attend within each row.

        Args:
            x: [R, S, D].
            cos, sin: [R, 1, S, head_dim].
            mask: bool [R, 1, 1, S], which positions are real.
        """
        # for every query: onnxruntime does not broadcast that axis
        mask = mask.expand(-1, -1, x.shape[1], -1)
        joined = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = joined.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        found: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return found


class VisionMLP(nn.Module):
    """SwiGLU, with biases."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        found: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return found


class VisionBlock(nn.Module):
    """Weights of one layer."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(c.hidden_size, eps=EPSILON)
        self.attn = VisionAttention(c)
        self.norm2 = nn.RMSNorm(c.hidden_size, eps=EPSILON)
        self.mlp = VisionMLP(c)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: one product for each patch.

    It has the checkpoint's shape until `as_linear` was called.
    """

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj: nn.Module = nn.Conv3d(c.channels, c.hidden_size, kernel, kernel, bias=False)

    def as_linear(self) -> None:
        """Put the product in the convolution's place."""
        weight = self.proj.get_parameter("weight")
        with torch.device("meta"):
            linear = nn.Linear(weight[0].numel(), len(weight), bias=False)
        linear.weight = nn.Parameter(weight.detach().flatten(1), requires_grad=False)
        if source := lazy_tensors.lazy(self.proj).get("weight"):
            shape = tuple(linear.weight.shape)
            flat = source.map("flatten(1)", lambda values: values.flatten(1), shape=shape)
            lazy_tensors.attach(linear, "weight", flat)
        self.proj = linear.eval()

    def forward(self, patches: Tensor) -> Tensor:
        """[W, L, patch values] -> [W, L, D]"""
        found: Tensor = self.proj(patches)
        return found


class Merger(nn.Module):
    """The patches of a token -> the token."""

    def __init__(self, c: VisionConfig) -> None:
        super().__init__()
        self.patches = c.merge_size**2
        width = self.patches * c.hidden_size
        self.ln_q = nn.RMSNorm(c.hidden_size, eps=EPSILON)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, c.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[W, L, D] -> [W, L / patches, D of the text branch]"""
        found: Tensor = self.mlp(self.ln_q(x).unflatten(1, (-1, self.patches)).flatten(2))
        return found


class VisionTower(nn.Module):
    """The tower. Parameter names equal Qwen's own below `visual.`.

    Args:
        longest: patches of the longest side of an image.
    """

    def __init__(self, config: VisionConfig, longest: int) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = Merger(config)
        self.config = config
        # Real even where the weights are on the meta device: nothing ever loads these. Computed on
        # the CPU, so that every device rotates by the same numbers.
        place = torch.get_default_device()
        with torch.device("cpu"):
            half = config.head_dim // 2
            exponents = torch.arange(0, half, 2, dtype=torch.float) / half
            angles = torch.arange(longest).float()[:, None] / config.rope_theta**exponents
            cos, sin = angles.cos(), angles.sin()
        if place.type != "meta":
            cos, sin = cos.to(place), sin.to(place)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, patches: Tensor, positions: Tensor, window_length: Tensor, token_order: Tensor
    ) -> Tensor:
        """W windows of L patches, M tokens.

        Args:
            patches: [W, L, patch values], those of a token one behind the other.
            positions: int64 [W, L, 2], each patch's row and column.
            window_length: int64 [W], how many of a window's patches are real.
            token_order: int64 [M], where each token of the image stands among the windows'.

        Returns:
            [M, D of the text branch], row by row.
        """
        windows, size = patches.shape[:2]
        cos, sin = self._rotary(self.cos, positions), self._rotary(self.sin, positions)
        real = torch.arange(size, device=patches.device) < window_length[:, None]
        within = (cos[:, None], sin[:, None], real[:, None, None])
        everywhere = tuple(one.flatten(0, 1)[None, None] for one in (cos, sin))
        everywhere = (*everywhere, real.flatten()[None, None, None])
        x = self.patch_embed(patches)
        for layer, block in enumerate(self.blocks):
            h = block.norm1(x)
            if layer in self.config.full_attention:
                joined = block.attn(h.flatten(0, 1)[None], *everywhere)
                x = x + joined.reshape(windows, size, -1)
            else:
                x = x + block.attn(h, *within)
            x = x + block.mlp(block.norm2(x))
        return self.merger(x).flatten(0, 1).index_select(0, token_order)

    def _rotary(self, table: Tensor, positions: Tensor) -> Tensor:
        """[W, L, head_dim]: a quarter by the row, a quarter by the column, and both once more."""
        both = F.embedding(positions, table).flatten(2)
        return torch.cat((both, both), dim=-1)
