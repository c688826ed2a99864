"""Draws and scores held-out prompts with the torch modules, to watch a training run.

    python -m training.sample --out DIR [--tokens predicted|true|off] [--limit N] [--sheet FILE]

`true` feeds the ControlNet the patch latents of a ground-truth image: what remains wrong then is
the diffusion model's own. `off` runs without the ControlNet.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from export.model.controlnet import LatentControlNet
from scenes.heldout import HeldOut, heldout
from scenes.layout import place
from scenes.render import render
from scenes.scorer import judge
from training.captioner import trained_captioner
from training.config import Config
from training.controlnet import control_samples, trained_controlnet
from training.decoder import finished_vae
from training.flux import FluxModel, trained_flux
from training.pool import unpack, vae_pool
from training.vae import to_pixels
from training.visual import decode, trained_branches

MU = 0.4675  # the dynamic shift at 64 image tokens


def sigmas(steps: int) -> list[float]:
    """Return the noise levels of FLUX's scheduler, from 1 to 0."""
    levels = np.linspace(1, 1 / steps, steps)
    return [*(math.exp(MU) / (math.exp(MU) + (1 / levels - 1))).tolist(), 0.0]


@torch.no_grad()
def draw(
    flux: FluxModel,
    vae: AutoencoderKL,
    pool: dict[str, Tensor],
    prompts: list[str],
    seed: int,
    control: LatentControlNet | None = None,
    tokens: Tensor | None = None,
    scale: float = 0.7,
    steps: int = 28,
) -> NDArray[np.uint8]:
    """uint8 [B, 128, 128, 3]"""
    prompt, pooled = flux.encode(prompts)
    places, channels = pool["latents"].shape[-1] ** 2 // 4, 4 * pool["latents"].shape[1]
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(len(prompts), places, channels, generator=generator)
    levels = sigmas(steps)
    for sigma, following in itertools.pairwise(levels):
        at = torch.full((len(prompts),), sigma)
        samples = None
        if control is not None and tokens is not None:
            samples = control_samples(control, flux, tokens, x_t, at, prompt, pooled, scale)
        x_t = x_t + (following - sigma) * flux(x_t, at, prompt, pooled, samples)
    latents = unpack(x_t, int(2 * places**0.5)) / pool["scale"] + pool["shift"]
    pixels = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sheet(images: list[NDArray[np.uint8]], columns: int, marks: list[bool]) -> Image.Image:
    """Return a grid of images, each framed green where it is right and red where not."""
    framed = []
    for image, right in zip(images, marks, strict=True):
        frame = np.empty((image.shape[0] + 6, image.shape[1] + 6, 3), np.uint8)
        frame[:] = (0, 170, 0) if right else (220, 0, 0)
        frame[3:-3, 3:-3] = image
        framed.append(frame)
    blank = np.zeros_like(framed[0])
    framed += [blank] * (-len(framed) % columns)
    rows = [np.concatenate(framed[i : i + columns], 1) for i in range(0, len(framed), columns)]
    return Image.fromarray(np.concatenate(rows))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", choices=("predicted", "true", "off"), default="predicted")
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    config, out = Config(), options.out
    flux, vae, pool = trained_flux(config, out), finished_vae(config, out), vae_pool(config, out)
    control = None if options.tokens == "off" else trained_controlnet(config, out, flux)
    branches = trained_branches(config, out) if options.tokens == "predicted" else None
    captioner = trained_captioner(config, out) if options.tokens == "true" else None
    every = max(1, 300 // options.limit)
    chosen: list[HeldOut] = list(heldout())[::every]
    right: dict[str, list[bool]] = defaultdict(list)
    images: list[NDArray[np.uint8]] = []
    for start in range(0, len(chosen), 32):
        items = chosen[start : start + 32]
        prompts, tokens = [item.prompt for item in items], None
        if branches is not None:
            tokens = decode(*branches, prompts, np.random.default_rng(start))
        elif captioner is not None:
            truth = [render(place(i.spec), i.spec.drawn_background) for i in items]
            with torch.no_grad():
                tokens = captioner.latents(to_pixels(truth))
        drawn = draw(flux, vae, pool, prompts, start, control, tokens, steps=options.steps)
        for item, image in zip(items, drawn, strict=True):
            verdict = judge(item.spec, image)
            right[item.spec.family].append(verdict.correct)
            images.append(image)
            if not verdict.correct:
                print(f"{item.prompt!r}: {verdict.reason}")
    for family, marks in right.items():
        print(f"{family:12} {100 * np.mean(marks):5.1f} %  of {len(marks)}")
    flat = [mark for marks in right.values() for mark in marks]
    print(f"{'overall':12} {100 * np.mean(flat):5.1f} %  of {len(flat)}")
    if options.sheet:
        sheet(images, 20, flat).save(options.sheet)


if __name__ == "__main__":
    main()
