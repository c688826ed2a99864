"""A mask as users paint it -> the visual tokens that it touches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt import image_processor

HALF = 128  # of 255: what is as white, or as transparent, is masked


def places(
    painted: Image.Image, side: int, size: tuple[int, int] | None = None
) -> NDArray[np.bool_]:
    """Return the tokens of a square grid that a mask touches, [side * side], row by row.

    Args:
        painted: the mask, as `images.painted` reads it.
        side: tokens of the grid's side.
        size: width and height of the image that is masked, to which the mask is stretched; None:
            the mask's own. What is not square is cut at its middle.
    """
    if size is not None and painted.size != size:
        painted = painted.resize(size, Image.Resampling.NEAREST)
    touched = np.asarray(image_processor.middle(painted)) >= HALF
    edge = len(touched)
    bounds = [(i * edge // side, -(-(i + 1) * edge // side)) for i in range(side)]
    cells = [
        touched[top:bottom, left:right].any() for top, bottom in bounds for left, right in bounds
    ]
    return np.array(cells)
