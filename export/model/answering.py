"""The MLLM's text as an engine: new rows in, keys and values and the next token out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bifrost_rt.dims import CANDIDATES
from export import lazy_tensors
from export.model.sampling import choose
from export.model.text_branch import TextBranch
from export.model.visual_branch import VisualBranch


class MllmText(nn.Module):
    """Prompts and answers of U texts. Of the visual branch it holds the mask token.

    Args:
        head: [D -> V], without a bias.
    """

    def __init__(self, branch: TextBranch, head: nn.Linear, visual: VisualBranch) -> None:
        super().__init__()
        self.branch = branch
        self.lm_head = head
        self.mask_token = visual.mask_token
        if source := lazy_tensors.lazy(visual).get("mask_token"):
            lazy_tensors.attach(self, "mask_token", source)

    def forward(
        self,
        input_ids: Tensor,
        image_tokens: Tensor,
        row_sources: Tensor,
        positions: Tensor,
        past_length: Tensor,
        new_length: Tensor,
        seen: Tensor,
        answer: Tensor,
        answer_step: Tensor,
        uniform: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        repetition_penalty: Tensor,
        *cache: Tensor,
    ) -> tuple[Tensor, ...]:
        """Return the tensors are described where the engine is declared."""
        texts, rows = input_ids.shape
        known = torch.cat((self.branch.embed_tokens(input_ids).flatten(0, 1), image_tokens))
        x = known.index_select(0, row_sources.flatten()).unflatten(0, (texts, rows))
        last, keys, values = self.branch.extend(
            x, positions, past_length, new_length, cache[0::2], cache[1::2]
        )
        logits = self.lm_head(last)
        seen = seen.scatter(1, input_ids, torch.ones_like(input_ids, dtype=seen.dtype))
        step = answer_step.expand(texts)[:, None]
        chosen = choose(
            logits,
            seen,
            uniform.gather(1, step),
            temperature,
            top_k,
            top_p,
            repetition_penalty,
            CANDIDATES,
        )
        place = (new_length - 1).clamp(min=0).expand(3, texts)[:, :, None]
        return (
            logits,
            chosen,
            positions.gather(2, place) + 1,
            past_length + new_length,
            seen,
            answer.scatter(1, step, chosen),
            answer_step + 1,
            self.mask_token.expand(texts, -1, -1),
            *(cached for layer in zip(keys, values, strict=True) for cached in layer),
        )
