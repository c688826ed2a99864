"""The text branch: Qwen2.5-VL's decoder over text and image tokens, with a K/V cache.

Prompt and answer are the same arithmetic: some new rows behind those that the cache holds. Text
never sees visual tokens, so drawing reads what one call over the prompt leaves in the cache (spec:
bit-equal to the reference).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.model.cache import visible, write_rows
from export.model.decoder import DecoderLayer, rotary_table, rotate
from export.model.decoder_config import DecoderConfig


class TextBranch(nn.Module):
    """Qwen2.5's decoder without its head. Parameter names equal Qwen's own below `model.`.

    Args:
        max_length: tokens of the longest conversation; positions are below it.
    """

    def __init__(self, config: DecoderConfig, max_length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.sections = config.sections
        self.kv_shape = (config.num_key_value_heads, config.head_dim)
        # Real even where the weights are on the meta device: nothing ever loads these. Computed on
        # the CPU, so that every device rotates by the same numbers.
        place = torch.get_default_device()
        with torch.device("cpu"):
            cos, sin = rotary_table(config, max_length)
        if place.type != "meta":
            cos, sin = cos.to(place), sin.to(place)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, input_ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Prompts of text alone, `input_ids` [U, S], right-padded -> per layer keys (rotated) and
        values, each [U, kv_heads, S, head_dim]. Padded rows hold don't-care values."""
        texts, length = input_ids.shape
        kv_heads, head_dim = self.kv_shape
        positions = torch.arange(length, device=input_ids.device).expand(3, texts, length)
        nothing = input_ids.new_zeros(texts)
        empty = self.cos.new_zeros(texts, kv_heads, length, head_dim)
        empties = [empty] * len(self.layers)
        _, keys, values = self.extend(
            self.embed_tokens(input_ids), positions, nothing, nothing + length, empties, empties
        )
        return keys, values

    def extend(
        self,
        x: Tensor,
        positions: Tensor,
        past_length: Tensor,
        new_length: Tensor,
        past_keys: Sequence[Tensor],
        past_values: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Compute R new rows of each text and write their keys and values into the cache.

        The last layer gives every row's key and value, and everything else for the last real row
        alone: nothing reads the others.

        Args:
            x: [U, R, D], embedded tokens; right-padded, where texts differ in length.
            positions: int64 [3, U, R], of M-RoPE: time, height, width.
            past_length: int64 [U], rows that the cache holds of each text.
            new_length: int64 [U], how many of the R rows are real.
            past_keys, past_values: per layer [U, kv_heads, C, head_dim], finite beyond
                `past_length` too; C is at least past_length + R.

        Returns:
            The last real row behind the final norm [U, D], and per layer keys and values
            [U, kv_heads, C, head_dim].
        """
        rows = x.shape[1]
        cos, sin = self._rotary(self.cos, positions), self._rotary(self.sin, positions)
        mask = visible(past_length, rows, past_keys[0].shape[2])
        last = (new_length - 1).clamp(min=0)
        keys, values = [], []
        for layer, past_k, past_v in zip(self.layers, past_keys, past_values, strict=True):
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.key_value(h)
            k = write_rows(past_k, rotate(k, cos, sin), past_length)
            v = write_rows(past_v, v, past_length)
            keys.append(k)
            values.append(v)
            if layer is self.layers[-1]:
                x, h = _row(x, last), _row(h, last)
                place = last[:, None, None, None]
                cos, sin = (_take(table, place, 2) for table in (cos, sin))
                mask = visible(past_length + last, 1, past_k.shape[2])
            q = rotate(layer.self_attn.query(h), cos, sin)
            x = x + layer.self_attn.attend(q, k, v, mask=mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.norm(x).flatten(1), keys, values

    def _rotary(self, table: Tensor, positions: Tensor) -> Tensor:
        """[U, 1, R, head_dim]: every section of the frequencies by the position on its axis."""
        half = table.split(self.sections, dim=1)
        parts = [F.embedding(positions[i], axis) for i, axis in enumerate(half)]
        return torch.cat((*parts, *parts), dim=-1)[:, None]


def _row(x: Tensor, place: Tensor) -> Tensor:
    """[U, R, D] at [U] -> [U, 1, D]: whole rows of memory, which gather would take apart."""
    texts, rows = x.shape[:2]
    # Counted and looked up: a product with `rows` would copy that size to a GPU, and onnxruntime
    # records no CUDA graph of an engine that copies.
    flat = torch.arange(texts * rows, device=x.device).unflatten(0, (texts, rows))
    return x.flatten(0, 1).index_select(0, flat.gather(1, place[:, None])[:, 0])[:, None]


def _take(x: Tensor, place: Tensor, dim: int) -> Tensor:
    """One entry along `dim`, another one for each text."""
    shape = [*x.shape]
    shape[dim] = 1
    return x.gather(dim, place.expand(shape))
