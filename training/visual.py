"""The visual branch: masked prediction of the frozen tower's patch latents from the frozen text.

As in the paper (section 3.2): mean squared error on the masked places, random masking ratio, the
branch initialised from the text branch it stands beside.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from export.model.decoder_config import DecoderConfig
from export.model.text_branch import TextBranch
from export.model.visual_branch import VisualBranch
from training.captioner import (
    PLACES,
    latent_pool,
    mllm_config,
    padded,
    trained_captioner,
)
from training.config import Config
from training.loop import load_weights
from training.pool import scene, wording
from training.template import ask_for_image
from training.tokenizers import qwen_tokenizer, token_id


def decoder_config(config: Config) -> DecoderConfig:
    """Return the facts that both branches share."""
    return DecoderConfig.from_dict(mllm_config(config).to_dict())


def text_keys_values(
    branch: TextBranch, prompts: list[str]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Keys and values per layer for the prompts in the chat frame, and the mask of real tokens."""
    tokenizer = qwen_tokenizer()
    rows = [tokenizer.encode(ask_for_image(prompt)).ids for prompt in prompts]
    ids = padded(rows, token_id(tokenizer, "<|endoftext|>"))
    mask = torch.tensor([[i < len(row) for i in range(ids.shape[1])] for row in rows])
    with torch.no_grad():
        keys, values = branch(ids)
    return keys, values, mask


def build_branches(config: Config, out: Path) -> tuple[TextBranch, VisualBranch]:
    """Return the frozen text branch, and the visual branch as its copy."""
    decoder = decoder_config(config)
    trained = trained_captioner(config, out).mllm.model.language_model.state_dict()
    text = TextBranch(decoder, max_length=256)
    text.load_state_dict({k: v for k, v in trained.items() if k in text.state_dict()})
    visual = VisualBranch(decoder, PLACES)
    visual.load_state_dict(trained, strict=False)
    torch.nn.init.normal_(visual.mask_token, std=0.02)
    torch.nn.init.normal_(visual.learnable_pos_emb, std=0.02)
    return text.eval().requires_grad_(False), visual


class VisualStage:
    """Masked prediction; only the visual branch learns."""

    name = "visual"

    def __init__(self, config: Config, out: Path) -> None:
        self.text, self.module = build_branches(config, out)
        self.latents = latent_pool(config, out)
        self.specs = [scene(config, i)[0] for i in range(config.pool)]

    def loss(self, step: int, batch: int, rng: np.random.Generator) -> Tensor:
        """Mean squared error on the masked places."""
        chosen = rng.integers(len(self.specs), size=batch)
        texts = [wording(self.specs[i], rng) for i in chosen]
        texts = [t.capitalize() if rng.random() < 0.15 else t for t in texts]
        target = self.latents[torch.as_tensor(chosen)]
        hidden = np.zeros((batch, PLACES), bool)
        for row in hidden:
            count = math.ceil(PLACES * math.cos(math.pi / 2 * rng.random()))
            row[rng.permutation(PLACES)[: max(1, count)]] = True
        mask = torch.as_tensor(hidden)[..., None]
        tokens = torch.where(mask, self.module.mask_token, target)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            keys, values, real = text_keys_values(self.text, texts)
            predicted = self.module(tokens, keys, values, real)
        error = (predicted.float() - target).square().mean(-1, keepdim=True)
        return (error * mask).sum() / mask.sum()


def trained_branches(config: Config, out: Path) -> tuple[TextBranch, VisualBranch]:
    """Text and visual branch in eval mode."""
    text, visual = build_branches(config, out)
    load_weights(visual, out, "visual")
    return text, visual.eval().requires_grad_(False)


@torch.no_grad()
def decode(
    text: TextBranch,
    visual: VisualBranch,
    prompts: list[str],
    rng: np.random.Generator,
    steps: int = PLACES,
) -> Tensor:
    """Masked decoding in `steps` steps: the patch latents [B, N, D] of the prompts."""
    keys, values, real = text_keys_values(text, prompts)
    rows = len(prompts)
    order = np.stack([rng.permutation(PLACES) for _ in range(rows)])
    masked = np.ones((rows, PLACES), bool)
    tokens = visual.mask_token.expand(rows, PLACES, -1).clone()
    for step in range(steps):
        predicted = visual(tokens, keys, values, real)
        keep = math.floor(PLACES * math.cos(math.pi / 2 * (step + 1) / steps))
        keep = 0 if step == steps - 1 else max(1, min(int(masked[0].sum()) - 1, keep))
        stay = np.zeros_like(masked)
        np.put_along_axis(stay, order[:, :keep], True, axis=1)
        reveal = torch.as_tensor(masked & ~stay)[..., None]
        tokens = torch.where(reveal, predicted, tokens)
        masked &= stay
    return tokens
