"""The visual branch: predicts patch-level CLIP latents from the text's K/V cache.

Source: arXiv 2508.05954, section 3.2; checkpoint keys as in the official `MultiModalityCausalLM`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from export.model.decoder import DecoderLayer
from export.model.decoder_config import DecoderConfig


class VisualBranch(nn.Module):
    """N masked or revealed tokens -> N predicted latents.

    Its parameters have the names of the text branch's; `visual_key` gives the official ones.
    """

    def __init__(self, config: DecoderConfig, num_tokens: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.learnable_pos_emb = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.vision_head = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        tokens: Tensor,
        text_keys: Sequence[Tensor],
        text_values: Sequence[Tensor],
        text_mask: Tensor,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """Predictions for the places that are wanted.

        The last layer gives every place's key and value, and everything else for the wanted places
        alone: nothing reads the other rows. The reference computes them and does not use them.

        Args:
            tokens: [R, N, D], `mask_token` where masked. The positional embedding is added here
                and never kept.
            text_keys, text_values: per layer [R, kv_heads, S, head_dim], from `TextBranch`.
            text_mask: bool [R, S], true where a text token is real.
            wanted: int64 [R, K], places of each row; None: all of them, as in training.

        Returns:
            [R, K, D]. Visual tokens see all real text and each other, both ways; their rotary
            position is 0, the identity, so no rotation appears here.
        """
        rows, places = tokens.shape[0], tokens.shape[1]
        visible = torch.cat((text_mask, text_mask.new_ones(rows, places)), dim=1)[:, None, None, :]
        mask = visible.expand(-1, -1, places, -1)  # [R, 1, N, S+N]
        x = tokens + self.learnable_pos_emb
        last = self.layers[-1]
        for layer, text_k, text_v in zip(self.layers, text_keys, text_values, strict=True):
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.key_value(h)
            k, v = torch.cat((text_k, k), dim=2), torch.cat((text_v, v), dim=2)
            if layer is last and wanted is not None:
                x, h = _rows(x, wanted), _rows(h, wanted)
                mask = visible.expand(-1, -1, wanted.shape[1], -1)
            x = x + layer.self_attn.attend(layer.self_attn.query(h), k, v, mask=mask)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.vision_head(self.norm(x))


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """[R, N, D] at [R, K] -> [R, K, D]: whole rows of memory, which gather would take apart."""
    rows, length = x.shape[:2]
    flat = places + length * torch.arange(rows, device=x.device)[:, None]
    return x.flatten(0, 1).index_select(0, flat.flatten()).unflatten(0, places.shape)


def visual_key(name: str) -> str:
    """Return the official checkpoint's key of a parameter of `VisualBranch`.

    >>> visual_key("layers.0.self_attn.q_proj.weight")
    'vision_language_model.model.layers.0.self_attn.vision_branch_q_proj.weight'
    """
    if not name.startswith(("layers.", "norm.")):
        return name
    parts = name.split(".")
    at = {"layers": 2, "norm": 0}[parts[0]]
    at += parts[at] == "self_attn"
    parts[at] = "vision_branch_" + parts[at]
    return ".".join(["vision_language_model", "model", *parts])
