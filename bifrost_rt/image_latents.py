"""An image -> its latents, as denoising ends with them, and the region of it that stays."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt import dims, image_processor, masks
from bifrost_rt.engines import Engines
from bifrost_rt.errors import RequestError
from bifrost_rt.known_region import KnownRegion
from bifrost_rt.manifest import SetSpec
from bifrost_rt.numerics import refuse_infinite

NAME = "vae_encode"


def can_keep(manifest: SetSpec) -> bool:
    """Say whether a set can read the pixels of an image."""
    return any(spec.name == NAME for spec in manifest.engines)


def require(manifest: SetSpec) -> None:
    """Check that a set can read the pixels of an image.

    Raises:
        RequestError: it cannot.
    """
    if not can_keep(manifest):
        raise RequestError(
            f"keep_pixels: the set {manifest.name!r} has no engine `{NAME}`; it was built by an "
            "earlier version, or from a VAE without encoder",
            hint="rebuild it from a complete VAE, or leave keep_pixels out",
        )


def encode(
    engines: Engines, manifest: SetSpec, pixels: NDArray[np.uint8], timings: dict[str, float]
) -> NDArray[np.float32]:
    """Return the latents of images [n, H, W, 3] of the set's size, [n, S, C].

    Raises:
        BudgetError: they do not fit into the memory budget.
        NumericsError: a value is not finite.
    """
    sizes = dims.of_run(text_tokens=1, steps=1, sources=len(pixels))
    engines.begin((NAME,), lambda engine: sizes)
    found = engines.run(NAME, engines.put(NAME, pixels=pixels), timings)["known_latents"]
    latents: NDArray[np.float32] = engines.backend.download(found).copy()
    engines.check_files()
    refuse_infinite(NAME, "known_latents", latents, "image")
    return latents


def known_region(
    engines: Engines, manifest: SetSpec, image: Image.Image, painted: Image.Image
) -> KnownRegion | None:
    """Return what lies outside the mask of an image; None where that is nothing. What is not square
    is cut at its middle.

    Args:
        image: in RGB.
        painted: the mask, as `masks.touched` takes it; stretched to the image's size.

    Raises:
        BudgetError, NumericsError: as `encode` does.
    """
    model = manifest.model
    side = model.image_width
    in_pixels = ~masks.touched(painted, side, image.size)
    in_latents = ~masks.touched(painted, math.isqrt(model.num_image_tokens), image.size)
    if not in_pixels.any():
        return None
    square = image_processor.middle(image)
    if square.width != side:
        square = square.resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.asarray(square)[None]
    latents = encode(engines, manifest, pixels, {})
    return KnownRegion(pixels, in_pixels[None], latents, in_latents.reshape(1, -1))
