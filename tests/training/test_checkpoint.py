"""The bundled checkpoint: it loads strictly, its VAE keeps images readable, and it draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoint import Checkpoint
from scenes.heldout import heldout
from scenes.scorer import judge
from training.config import Config
from training.flux import FluxModel
from training.roundtrip import measure
from training.sample import draw
from training.tokenizers import qwen_tokenizer
from training.vae import build_vae
from training.visual import decode

BUNDLED = Path(__file__).parents[2] / "engines" / "checkpoints" / "scenes"


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(BUNDLED / "mllm", BUNDLED / "bifrost", BUNDLED / "flux")


def test_the_folders_are_small_and_complete(checkpoint: Checkpoint) -> None:
    size = sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file())
    assert size < 60e6
    checkpoint.text_branch(96), checkpoint.visual_branch()
    checkpoint.refuse_left_overs()
    assert checkpoint.ignored_files == []


def test_tokenizers_are_those_of_the_recipe() -> None:
    written = (BUNDLED / "mllm" / "tokenizer.json").read_text(encoding="utf-8")
    assert written.strip() == qwen_tokenizer().to_str(pretty=True).strip()


def test_the_vae_keeps_images_readable() -> None:
    from safetensors.torch import load_file

    vae = build_vae(Config())
    weights = load_file(BUNDLED / "flux" / "vae" / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict(weights)
    before, after, psnr, _ = measure(vae.float().eval(), 60)
    assert sum(before) == 60
    assert sum(after) >= 59
    assert np.mean(psnr) > 30


def test_a_handful_of_prompts_is_drawn_right(checkpoint: Checkpoint) -> None:
    """One held-out prompt of every family, in ten denoising steps."""
    items = heldout()[7::50]
    prompts = [item.prompt for item in items]
    flux = FluxModel(Config())
    for name in ("transformer", "clip", "t5"):
        setattr(flux, name, getattr(checkpoint, name).float().eval())
    text, visual = checkpoint.text_branch(96).float(), checkpoint.visual_branch().float().eval()
    with torch.no_grad():
        tokens = decode(text, visual, prompts, np.random.default_rng(0), steps=8)
    config = checkpoint.vae.config
    pool = {
        "latents": torch.zeros(1, config.latent_channels, 16, 16),
        "scale": torch.tensor(config.scaling_factor),
        "shift": torch.tensor(config.shift_factor),
    }
    control = checkpoint.controlnet.float().eval()
    vae = checkpoint.vae.float().eval()
    images = draw(flux, vae, pool, prompts, 0, control, tokens, steps=10)
    right = [judge(i.spec, p).correct for i, p in zip(items, images, strict=True)]
    assert sum(right) >= 5, list(zip(prompts, right, strict=True))
