"""Measures scorer and VAE together: renders that went through the published VAE.

    python -m training.roundtrip --checkpoint engines/checkpoints/scenes [--count N] [--sheet FILE]

A scorer that fails these would blame the model for its autoencoder, so this comes before any score.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image

from scenes.layout import place
from scenes.render import render
from scenes.sampling import any_spec
from scenes.scorer import judge
from scenes.world import FAMILIES
from training.vae import to_pixels


@torch.no_grad()
def round_trip(vae: AutoencoderKL, images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """uint8 [B, H, W, 3] after encoding and decoding."""
    output = vae.decode(vae.encode(to_pixels(images)).latent_dist.mode()).sample
    pixels = (output / 2 + 0.5).clamp(0, 1) * 255
    return pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def measure(
    vae: AutoencoderKL, count: int, seed: int = 0
) -> tuple[list[bool], list[bool], list[float], list[NDArray[np.uint8]]]:
    """Right before, right after, PSNR in dB and the images after, for random scenes."""
    rng = np.random.default_rng(seed)
    before, after, psnr, images = [], [], [], []
    for start in range(0, count, 20):
        families = [FAMILIES[i % len(FAMILIES)] for i in range(start, min(count, start + 20))]
        specs = [any_spec(rng, family) for family in families]
        drawn = [render(place(spec, rng), spec.drawn_background) for spec in specs]
        returned = list(round_trip(vae, drawn))
        for spec, old, new in zip(specs, drawn, returned, strict=True):
            before.append(judge(spec, old).correct)
            after.append(judge(spec, new).correct)
            error = np.mean((old.astype(np.float64) - new) ** 2)
            psnr.append(float(10 * np.log10(255**2 / error)))
        images += returned
    return before, after, psnr, images


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1200)
    parser.add_argument("--sheet", type=Path)
    given = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(given.checkpoint / "flux" / "vae").float().eval()
    before, after, psnr, images = measure(vae, given.count)
    print(f"scorer on renders           {100 * np.mean(before):6.2f} %  of {len(before)}")
    print(f"scorer after the VAE        {100 * np.mean(after):6.2f} %")
    print(f"PSNR of the VAE             {np.mean(psnr):6.2f} dB")
    if given.sheet:
        rows = [np.concatenate(images[i : i + 12], 1) for i in range(0, 48, 12)]
        Image.fromarray(np.concatenate(rows)).save(given.sheet)


if __name__ == "__main__":
    main()
