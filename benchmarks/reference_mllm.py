"""The official MLLM as it is: both branches for all rows, no cache, the whole sequence every step.

It shares nothing with the engines' networks (`export/model`), so that it can judge them. Parameters
have the official names (`MultiModalityCausalLM`, arXiv 2508.05954).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.checkpoint import Checkpoint
from export.model.decoder_config import DecoderConfig
from export.weights import Weights, fill


class RMSNorm(nn.Module):
    """Qwen's, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """One attention over all rows; every projection exists twice."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = c.num_attention_heads, c.head_dim
        self.groups = c.num_attention_heads // c.num_key_value_heads
        kv = c.num_key_value_heads * c.head_dim
        for branch in ("", "vision_branch_"):
            for name, width in (("q", self.heads * self.head_dim), ("k", kv), ("v", kv)):
                setattr(self, f"{branch}{name}_proj", nn.Linear(c.hidden_size, width))
            out = nn.Linear(self.heads * self.head_dim, c.hidden_size, bias=False)
            setattr(self, f"{branch}o_proj", out)

    def forward(self, x: Tensor, visual: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [R, L, D], visual [R, L, 1], bias [R, 1, L, L], cos and sin [R, 1, L, head_dim]"""
        q, k, v = (
            self._both(f"{name}_proj", x, visual).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for name in "qkv"
        )
        q, k = q * cos + _rotated(q) * sin, k * cos + _rotated(k) * sin
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        scores = q @ k.transpose(2, 3) / math.sqrt(self.head_dim) + bias
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self._both("o_proj", mixed, visual)

    def _both(self, name: str, x: Tensor, visual: Tensor) -> Tensor:
        text_rows = getattr(self, name)(x) * (1 - visual)
        return text_rows + getattr(self, f"vision_branch_{name}")(x) * visual


class Layer(nn.Module):
    """A decoder layer with both branches."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        for branch in ("", "vision_branch_"):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                setattr(self, branch + norm, RMSNorm(c.hidden_size, c.rms_norm_eps))
            setattr(self, f"{branch}mlp", MLP(c))

    def forward(self, x: Tensor, visual: Tensor, bias: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[R, L, D] -> [R, L, D]"""
        h = self._both("input_layernorm", x, visual)
        x = x + self.self_attn(h, visual, bias, cos, sin)
        return x + self._both("mlp", self._both("post_attention_layernorm", x, visual), visual)

    def _both(self, name: str, x: Tensor, visual: Tensor) -> Tensor:
        text_rows = getattr(self, name)(x) * (1 - visual)
        return text_rows + getattr(self, f"vision_branch_{name}")(x) * visual


class ReferenceMllm(nn.Module):
    """Left-padded text and N visual tokens -> a prediction for every visual token."""

    def __init__(self, c: DecoderConfig, num_tokens: int) -> None:
        super().__init__()
        self.rope_theta, self.head_dim = c.rope_theta, c.head_dim
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.vision_branch_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.hidden_size))
        self.learnable_pos_emb = nn.Parameter(torch.zeros(1, num_tokens, c.hidden_size))
        self.vision_head = nn.Linear(c.hidden_size, c.hidden_size)

    def forward(self, input_ids: Tensor, pad: Tensor, tokens: Tensor) -> Tensor:
        """One prediction for every place.

        Args:
            input_ids: [R, S], left-padded.
            pad: [R], how much of it is padding.
            tokens: [R, N, D].

        Returns:
            [R, N, D]
        """
        rows, text = input_ids.shape
        places = tokens.shape[1]
        x = torch.cat([self.embed_tokens(input_ids), tokens + self.learnable_pos_emb], dim=1)
        at = torch.arange(text + places)
        visual = (at >= text).float().expand(rows, -1)[..., None]  # [R, L, 1]
        real = at >= pad[:, None]  # [R, L]
        sees = (at[None, :] <= at[:, None]) | (at[:, None] >= text)  # [L, L]
        # a large number, not -inf: a row of padding sees nothing and must not become NaN
        bias = torch.where(sees & real[:, None, :], 0.0, torch.finfo(torch.float32).min)[:, None]
        cos, sin = self._rotary((at - pad[:, None]).clamp(min=0) * (at < text))
        for layer in self.layers:
            x = layer(x, visual, bias, cos, sin)
        return self.vision_head(self.vision_branch_norm(x[:, text:]))

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [R, L] -> two of [R, 1, L, head_dim]. Visual tokens all stand at 0."""
        exponents = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        angles = positions[:, None, :, None].float() / self.rope_theta**exponents
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def load(checkpoint: Checkpoint) -> ReferenceMllm:
    """Both branches, where the checkpoint has them; the text branch's rest from the base model."""
    base_prefix = "model."
    if "model.language_model.embed_tokens.weight" in checkpoint.base:
        base_prefix = "model.language_model."

    def find(name: str) -> tuple[Weights, str]:
        if name.startswith(("mask_token", "learnable_pos_emb", "vision_head.")):
            return checkpoint.trained, name
        key = f"vision_language_model.model.{name}"
        if key in checkpoint.trained or "vision_branch" in name:
            return checkpoint.trained, key
        return checkpoint.base, base_prefix + name

    with torch.device("meta"):
        net = ReferenceMllm(checkpoint.decoder, checkpoint.num_visual_tokens)
    fill(net, "reference MLLM", find)
    return net


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
