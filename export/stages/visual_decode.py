"""`visual_decode`: one step of masked decoding, with guidance and the writing of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bifrost_rt.dims import BRANCHES, IMAGES, REVEALED, STEPS
from bifrost_rt.manifest import TensorSpec
from export.model.decoder_config import DecoderConfig
from export.model.visual_branch import VisualBranch
from export.stages import Stage
from export.stages.text_prefill import cache_specs


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


def stage(branch: VisualBranch, c: DecoderConfig) -> Stage:
    """tokens [B, N, D] -> tokens [B, N, D]"""
    num_tokens = branch.learnable_pos_emb.shape[1]
    tokens = (IMAGES, num_tokens, c.hidden_size)
    return Stage(
        name="visual_decode",
        module=VisualDecode(branch),
        inputs=(
            TensorSpec("tokens", "float32", tokens),
            TensorSpec("step", "int64", (1,)),
            TensorSpec("text_length", "int64", (BRANCHES, IMAGES)),
            TensorSpec("reveal_places", "int64", (STEPS, IMAGES, REVEALED)),
            TensorSpec("token_sources", "int64", (STEPS, IMAGES, num_tokens)),
            TensorSpec("cfg_weight", "float32", (1,)),
            *cache_specs(c),
        ),
        outputs=(
            TensorSpec("next_tokens", "float32", tokens),
            TensorSpec("next_step", "int64", (1,)),
        ),
        tolerance=1e-4,
        carry={"next_tokens": "tokens", "next_step": "step"},
    )
