"""One step of the MLLM's masked decoding, which writes the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export.model.visual_branch import VisualBranch


class VisualDecode(nn.Module):
    """Predict the places that this step reveals, write them, count the step.

    The schedule is data: the step reads its row of `reveal_places` and `token_sources`, so a loop
    needs nothing from the host. Steps that reveal fewer places than the largest one predict some
    that no source names.
    """

    def __init__(self, branch: VisualBranch) -> None:
        super().__init__()
        self.branch = branch

    def forward(
        self,
        tokens: Tensor,
        step: Tensor,
        text_length: Tensor,
        text_index: Tensor,
        reveal_places: Tensor,
        token_sources: Tensor,
        cfg_weight: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """text_length [U]; text_index [G, B]: which text each image of each branch reads; the
        cache, per layer keys and values [U, kv_heads, S, head_dim]."""
        branches = text_index.shape[0]
        text_tokens = cache[0].shape[2]
        places = torch.arange(text_tokens, device=tokens.device)
        texts = text_index.flatten()  # [G*B]
        text_mask = places < text_length.index_select(0, texts)[:, None]  # [G*B, S]
        rows = tokens[None].expand(branches, -1, -1, -1).flatten(0, 1)  # [G*B, N, D]
        flat = [cached.index_select(0, texts) for cached in cache]
        revealed = reveal_places.index_select(0, step)  # [1, B, K]
        wanted = revealed.expand(branches, -1, -1).flatten(0, 1)  # [G*B, K]
        pred = self.branch(rows, flat[0::2], flat[1::2], text_mask, wanted)
        pred = pred.unflatten(0, text_index.shape)  # [G, B, K, D]
        # With one branch the first is the last, and guidance adds an exact zero.
        uncond, cond = pred[0], pred[-1]
        pred = uncond + cfg_weight * (cond - uncond)
        known = torch.cat((tokens.flatten(0, 1), pred.flatten(0, 1)))  # [B*N + B*K, D]
        source = token_sources.index_select(0, step).flatten()  # [B*N]
        return known.index_select(0, source).view_as(tokens), step + 1
