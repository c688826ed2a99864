"""What is drawn anew of an image: a mask as users paint it, a canvas around it -> cells of a grid:
visual tokens, latents or pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt import image_processor

HALF = 128  # of 255: what is as white, or as transparent, is masked


def touched(
    painted: Image.Image, side: int, size: tuple[int, int] | None = None
) -> NDArray[np.bool_]:
    """Return the cells of a square grid that a mask touches, [side, side].

    Args:
        painted: the mask, as `images.painted` reads it.
        side: cells of the grid's side.
        size: width and height of the image that is masked, to which the mask is stretched; None:
            the mask's own. What is not square is cut at its middle.
    """
    if size is not None and painted.size != size:
        painted = painted.resize(size, Image.Resampling.NEAREST)
    marked = np.asarray(image_processor.middle(painted)) >= HALF
    edge = len(marked)
    bounds = [(i * edge // side, -(-(i + 1) * edge // side)) for i in range(side)]
    rows = np.stack([marked[top:bottom].any(axis=0) for top, bottom in bounds])
    return np.stack([rows[:, left:right].any(axis=1) for left, right in bounds], axis=1)


def canvas(
    image: Image.Image, painted: Image.Image, share: float
) -> tuple[Image.Image, Image.Image]:
    """Put a canvas around an image, square by cutting at its middle, and mask it.

    Args:
        painted: the image's own mask, as `touched` takes it.
        share: width of the canvas on each side, of the image's side.

    Returns:
        The image in the middle, with its edge pixels carried on outwards, and the mask of the
        canvas, of the same size: white around the image, and inside as it was.
    """
    if painted.size != image.size:
        painted = painted.resize(image.size, Image.Resampling.NEAREST)
    pixels, mask = (np.asarray(image_processor.middle(one)) for one in (image, painted))
    wide = round(share * len(pixels))
    around = [(wide, wide), (wide, wide)]
    return (
        Image.fromarray(np.pad(pixels, [*around, (0, 0)], mode="edge")),
        Image.fromarray(np.pad(mask, around, constant_values=255)),
    )
