"""A pool of training scenes, encoded once: rendering and encoding would otherwise cost more than
the step they feed. Scene i is a function of (seed, i); only its latents are stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scenes.captions import caption
from scenes.heldout import heldout_prompts
from scenes.layout import place
from scenes.render import render
from scenes.sampling import training_spec
from scenes.world import Placed, Spec
from training.config import Config
from training.loop import read, steps_done, write_aside
from training.vae import to_pixels, trained_vae


def scene(config: Config, index: int) -> tuple[Spec, tuple[Placed, ...]]:
    """Return the meaning and the objects of pool scene `index`."""
    rng = np.random.default_rng([config.seed, 90210, index])
    spec = training_spec(rng)
    return spec, place(spec, rng)


def pixels(config: Config, indices: range) -> Tensor:
    """[B, 3, 128, 128] in -1…1"""
    scenes = [scene(config, i) for i in indices]
    return to_pixels([render(objects, spec.drawn_background) for spec, objects in scenes])


def wording(spec: Spec, rng: np.random.Generator) -> str:
    """Return a caption that is not in the held-out list."""
    while True:
        text = caption(spec, rng)
        if text not in heldout_prompts():
            return text


def vae_pool(config: Config, out: Path) -> dict[str, Tensor]:
    """`latents` [pool, C, 16, 16], normalised by `shift` and `scale`, which diffusers calls
    shift_factor and scaling_factor. Encoded anew when the VAE has been trained further."""
    path, trained = out / "pool.vae", steps_done(out, "vae")
    if not path.exists() or read(path)["trained"] != trained:
        vae, parts = trained_vae(config, out), []
        with torch.no_grad():
            for start in range(0, config.pool, 64):
                chunk = pixels(config, range(start, min(config.pool, start + 64)))
                parts.append(vae.encode(chunk).latent_dist.mode())
        raw = torch.cat(parts)
        shift, scale = raw.mean(), 1 / raw.std()
        normal = (raw - shift) * scale
        write_aside({"latents": normal, "shift": shift, "scale": scale, "trained": trained}, path)
    return read(path)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4C], FLUX's order."""
    rows, channels, height, width = latents.shape
    x = latents.view(rows, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(rows, height * width // 4, channels * 4)


def unpack(packed: Tensor, side: int) -> Tensor:
    """Return the reverse, for a square of `side` latents."""
    rows, _, width = packed.shape
    x = packed.view(rows, side // 2, side // 2, width // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(rows, width // 4, side, side)
