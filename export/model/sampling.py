"""The choice of the next token, inside the engine: a loop needs nothing from the host."""

from __future__ import annotations

import torch
from torch import Tensor


def choose(
    logits: Tensor,
    seen: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    repetition_penalty: Tensor,
    candidates: int,
) -> Tensor:
    """Return the next token of each text, int64 [U, 1], by the rules of transformers and in their
    order: repetition penalty, temperature, top-k, top-p.

    Args:
        logits: float32 [U, V].
        seen: float32 [U, V], not 0 where a token occurs in the text.
        uniform: float32 [U, 1], random numbers in [0, 1).
        temperature: [1]; 0 takes the most likely token.
        top_k: int64 [1]; 0 takes all.
        top_p: [1]; 1 takes all.
        candidates: how many tokens a limit can leave, at most.
    """
    penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
    scores = torch.where(seen > 0, penalised, logits)
    greedy = scores.argmax(-1, keepdim=True)
    scaled = scores / torch.where(temperature > 0, temperature, torch.ones_like(temperature))
    best = scaled.topk(min(candidates, scaled.shape[1]), dim=-1).values  # [U, K], falling
    weights = (scaled - best[:, :1]).exp()
    among = (best - best[:, :1]).exp()
    by_k = (torch.arange(best.shape[1], device=best.device) < top_k) | (top_k == 0)
    among = torch.where(by_k, among, torch.zeros_like(among))
    whole = torch.where(top_k == 0, weights.sum(-1, keepdim=True), among.sum(-1, keepdim=True))
    before = among.cumsum(-1) - among
    kept = (by_k & (before < top_p * whole)).long().sum(-1, keepdim=True)  # the first ones
    limit = best.gather(1, (kept - 1).clamp(min=0))
    anything = (top_k == 0) & (top_p >= 1)
    weights = torch.where(anything | (scaled >= limit), weights, torch.zeros_like(weights))
    upto = weights.cumsum(-1)
    drawn = (upto <= uniform * upto[:, -1:]).long().sum(-1, keepdim=True)
    return torch.where(temperature > 0, drawn.clamp(max=scaled.shape[1] - 1), greedy)
