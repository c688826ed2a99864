"""The MLLM as an image captioner, so that the vision tower's patch latents mean something.

Three tasks share one language model: describe an image exactly, caption it, and, without an
image, answer a request for one with the exact description of the scene it implies. The last
makes the text branch work out counts and places, whose traces the visual branch then reads.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from scenes.captions import describe
from scenes.layout import SIDE, place, scatter
from scenes.render import render
from scenes.sampling import training_spec
from training.config import Config
from training.loop import load_weights, read, steps_done, write_aside
from training.pool import pixels, wording
from training.template import SPECIAL_TOKENS, ask_for_plan, ask_for_words
from training.tokenizers import qwen_tokenizer, token_id
from training.vae import random_background, to_pixels

PATCH = 16  # px; a 2x2 merge makes one patch latent of 32 px
GRID = SIDE // (2 * PATCH)
PLACES = GRID * GRID


def mllm_config(config: Config) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL at the recipe's widths."""
    ids = {t: qwen_tokenizer().token_to_id(t) for t in SPECIAL_TOKENS}
    head = config.hidden // config.heads
    side = head // 2 * 3 // 8
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": qwen_tokenizer().get_vocab_size(),
            "hidden_size": config.hidden,
            "intermediate_size": config.mlp,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head // 2 - 2 * side, side, side],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
        },
        vision_config={
            "depth": config.tower_layers,
            "hidden_size": config.tower_width,
            "intermediate_size": 3 * config.tower_width,
            "num_heads": 4,
            "out_hidden_size": config.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            # one window holds the whole image, and every layer attends over all of it
            "window_size": SIDE,
            "fullatt_block_indexes": list(range(config.tower_layers)),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def patches(images: Tensor) -> Tensor:
    """[B, 3, 128, 128] -> [B * 64, 3 * 2 * 16 * 16] in the order of Qwen's image processor:
    merge groups row by row, and the four patches of each inside; the image twice in time."""
    rows, half = images.shape[0], 2
    x = images.view(rows, 3, GRID, half, PATCH, GRID, half, PATCH)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3, 1, PATCH, PATCH)
    return x.expand(-1, -1, 2, -1, -1).reshape(x.shape[0], -1)


class Captioner(nn.Module):
    """Qwen2.5-VL with patch latents of zero mean and unit variance per channel.

    The normalisation trains as a batch norm without weights and is folded into the tower's last
    linear layer by `fold`: the published network has no trace of it.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.mllm = Qwen2_5_VLForConditionalGeneration._from_config(mllm_config(config))
        self.normalise = nn.BatchNorm1d(config.hidden, affine=False, momentum=0.02)

    def latents(self, images: Tensor) -> Tensor:
        """Patch latents [B, 16, D] of [B, 3, 128, 128]."""
        grid = torch.tensor([[1, 2 * GRID, 2 * GRID]] * images.shape[0])
        merged = self.mllm.model.visual(patches(images), grid_thw=grid).pooler_output
        return self.normalise(merged.float()).view(images.shape[0], PLACES, -1)

    def forward(self, ids: Tensor, latents: Tensor | None) -> Tensor:
        """Logits [B, L, V]; image tokens, if any, stand at the same places in every row."""
        model = self.mllm.model.language_model
        embeds = model.embed_tokens(ids)
        length = ids.shape[1]
        positions = torch.arange(length).expand(3, -1)
        if latents is not None:
            first = int((ids[0] == self.mllm.config.image_token_id).nonzero()[0])
            after = first + PLACES
            embeds = torch.cat((embeds[:, :first], latents.to(embeds), embeds[:, after:]), 1)
            square = torch.arange(PLACES)
            inside = torch.stack((0 * square, square // GRID, square % GRID)) + first
            rest = torch.arange(length - after).expand(3, -1) + first + GRID
            positions = torch.cat((positions[:, :first], inside, rest), 1)
        hidden = model(
            inputs_embeds=embeds,
            position_ids=positions[:, None].expand(-1, ids.shape[0], -1),
            use_cache=False,
        ).last_hidden_state
        return self.mllm.lm_head(hidden)

    @torch.no_grad()
    def fold(self) -> None:
        """Move the normalisation into the merger's last linear layer; equal in eval mode."""
        last = self.mllm.model.visual.merger.mlp[-1]
        scale = (self.normalise.running_var + self.normalise.eps).rsqrt()
        last.weight.mul_(scale[:, None])
        last.bias.copy_((last.bias - self.normalise.running_mean) * scale)
        self.normalise.reset_running_stats()
        self.normalise.eps = 0.0


def padded(rows: list[list[int]], fill: int) -> Tensor:
    """[B, longest], filled up at the right."""
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


class CaptionerStage:
    """Describe an image, or plan one: see the module's docstring."""

    name = "captioner"

    def __init__(self, config: Config, out: Path) -> None:
        self.module = Captioner(config)
        self.tokenizer = qwen_tokenizer()
        self.end = token_id(self.tokenizer, "<|im_end|>")
        self.frame = self.tokenizer.encode(ask_for_words(PLACES)).ids

    def _error(self, ask: list[list[int]], answers: list[str], latents: Tensor | None) -> Tensor:
        """Cross-entropy of the answers after the question tokens `ask`."""
        said = [[*e.ids, self.end] for e in self.tokenizer.encode_batch(answers)]
        ids = padded([q + a for q, a in zip(ask, said, strict=True)], self.end)
        targets = padded([[-100] * len(q) + a for q, a in zip(ask, said, strict=True)], -100)
        logits = self.module(ids[:, :-1], latents)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets[:, 1:].flatten())

    def loss(self, step: int, batch: int, rng: np.random.Generator) -> Tensor:
        """Cross-entropy per answer token, over images and plans."""
        images, answers = [], []
        for _ in range(batch):
            if rng.random() < 0.6:
                objects = scatter(rng, int(rng.integers(1, 5)))
                background = random_background(rng)
            else:
                spec = training_spec(rng)
                objects, background = place(spec, rng), spec.drawn_background
            images.append(render(objects, background))
            answers.append(describe(objects, background))
        requests, plans = [], []
        for _ in range(batch // 2):
            spec = training_spec(rng)
            text = wording(spec, rng)
            text = text.capitalize() if rng.random() < 0.15 else text
            requests.append(self.tokenizer.encode(ask_for_plan(text)).ids)
            plans.append(describe(place(spec), spec.drawn_background))
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            latents = self.module.latents(to_pixels(images))
            seen = self._error([self.frame] * batch, answers, latents)
            planned = self._error(requests, plans, None)
        return seen + 0.3 * planned


def trained_captioner(config: Config, out: Path) -> Captioner:
    """With the normalisation folded in, in eval mode."""
    captioner = Captioner(config)
    load_weights(captioner, out, "captioner")
    captioner.fold()
    return captioner.eval().requires_grad_(False)


def latent_pool(config: Config, out: Path) -> Tensor:
    """Patch latents [pool, 16, D] of the pool's scenes, as `vae_pool` keeps its own."""
    path, trained = out / "pool.latents", steps_done(out, "captioner")
    if not path.exists() or read(path)["trained"] != trained:
        captioner, parts = trained_captioner(config, out), []
        with torch.no_grad():
            for start in range(0, config.pool, 128):
                chunk = range(start, min(config.pool, start + 128))
                parts.append(captioner.latents(pixels(config, chunk)))
        write_aside({"latents": torch.cat(parts), "trained": trained}, path)
    latents: Tensor = read(path)["latents"]
    return latents
