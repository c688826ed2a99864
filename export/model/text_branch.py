"""The text branch up to its keys and values: all that image generation needs of the MLLM's text.

Text never sees visual tokens, so this runs once per prompt (spec: bit-equal to the reference).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.model.decoder import DecoderLayer, rotary_table, rotate
from export.model.decoder_config import DecoderConfig


class TextBranch(nn.Module):
    """Qwen2.5's decoder without final norm and head; the last layer stops at K and V.

    Parameter names equal Qwen's own below `model.`.
    """

    def __init__(self, config: DecoderConfig, max_length: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        last = config.num_hidden_layers - 1
        self.layers = nn.ModuleList(
            DecoderLayer(config, kv_only=i == last) for i in range(config.num_hidden_layers)
        )
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
        """`input_ids` [R, S], right-padded -> per layer keys (rotated) and values,
        each [R, kv_heads, S, head_dim].

        Causal attention alone keeps real rows from seeing the padding behind them; the padded
        rows hold don't-care values that the reader of the cache masks.
        """
        length = input_ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed_tokens(input_ids)
        keys, values = [], []
        for layer in self.layers:
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.key_value(h)
            k = rotate(k, cos, sin)
            keys.append(k)
            values.append(v)
            if len(keys) == len(self.layers):
                break
            q = rotate(layer.self_attn.query(h), cos, sin)
            x = x + layer.self_attn.attend(q, k, v, causal=True)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return keys, values
