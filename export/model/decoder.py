"""The Qwen2.5 decoder, thin: the two branches share this layer and differ only in their weights.

The stock classes carry caches, masks and position logic that the split into prefill and decode
does not need; written out, one layer exports to a graph that a person can read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.model.decoder_config import DecoderConfig


class Attention(nn.Module):
    """Projections of one grouped-query attention; q, k and v have a bias, the output has none."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = (
            c.num_attention_heads,
            c.num_key_value_heads,
            c.head_dim,
        )
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def query(self, x: Tensor) -> Tensor:
        """[R, S, D] -> [R, heads, S, head_dim]"""
        return self.q_proj(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[R, S, D] -> two of [R, kv_heads, S, head_dim]"""
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.head_dim)).transpose(1, 2)
        return k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor) -> Tensor:
        """Scaled dot product over [R, heads, S, head_dim], then the output projection."""
        # enable_gqa on equal head counts exports a repeat that does nothing.
        grouped = self.heads != self.kv_heads
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Weights of one layer."""

    def __init__(self, c: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c)


def rotary_table(c: DecoderConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of positions 0..length-1, each [length, head_dim / 2], in float32 as the
    reference."""
    inv_freq = 1.0 / (
        c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim)
    )
    angles = torch.arange(length).float()[:, None] * inv_freq[None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [R, heads, S, head_dim], half-split form (not interleaved)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
