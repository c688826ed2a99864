"""The MLLM: its text once, then one step of masked decoding, which writes the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from export import sources
from export.model.text_branch import TextBranch
from export.model.visual_branch import VisualBranch


class TextPrefill(nn.Module):
    """Each distinct text is computed once; images that share it share the computation. Of the
    visual branch it holds the mask token."""

    def __init__(self, branch: TextBranch, visual: VisualBranch) -> None:
        super().__init__()
        self.branch = branch
        self.mask_token = visual.mask_token
        if source := sources.lazy(visual).get("mask_token"):
            sources.attach(self, "mask_token", source)
        self.num_tokens = visual.learnable_pos_emb.shape[1]

    def forward(self, input_ids: Tensor, text_index: Tensor) -> tuple[Tensor, ...]:
        """input_ids [U, S]; text_index [G, B]: which text each image of each branch reads."""
        keys, values = self.branch(input_ids)
        rows = text_index.flatten()
        cache = [
            cached.index_select(0, rows).unflatten(0, text_index.shape)
            for layer in zip(keys, values, strict=True)
            for cached in layer
        ]
        tokens = self.mask_token.expand(text_index.shape[1], self.num_tokens, -1)
        return (tokens, *cache)


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
        reveal_places: Tensor,
        token_sources: Tensor,
        cfg_weight: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, Tensor]:
        branches = text_length.shape[0]
        text_tokens = cache[0].shape[3]
        places = torch.arange(text_tokens, device=tokens.device)
        text_mask = places < text_length.flatten()[:, None]  # [G*B, S]
        rows = tokens[None].expand(branches, -1, -1, -1).flatten(0, 1)  # [G*B, N, D]
        flat = [cached.flatten(0, 1) for cached in cache]
        revealed = reveal_places.index_select(0, step)  # [1, B, K]
        wanted = revealed.expand(branches, -1, -1).flatten(0, 1)  # [G*B, K]
        pred = self.branch(rows, flat[0::2], flat[1::2], text_mask, wanted)
        pred = pred.unflatten(0, text_length.shape)  # [G, B, K, D]
        # With one branch the first is the last, and guidance adds an exact zero.
        uncond, cond = pred[0], pred[-1]
        pred = uncond + cfg_weight * (cond - uncond)
        known = torch.cat((tokens.flatten(0, 1), pred.flatten(0, 1)))  # [B*N + B*K, D]
        source = token_sources.index_select(0, step).flatten()  # [B*N]
        return known.index_select(0, source).view_as(tokens), step + 1
