"""An image -> the patches that the vision tower reads, with numpy and Pillow alone.

Source: the image processor of Qwen2-VL (transformers, its variant on Pillow), whose numbers these
are to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt.errors import RequestError
from bifrost_rt.manifest import Vision

MOST_ASPECT = 200  # of the longer side to the shorter one, as in the reference


@dataclass(frozen=True)
class Patches:
    """An image for the tower: `rows` x `columns` tokens, each of merge_size² patches.

    Attributes:
        values: float32 [rows, columns, merge_size², patch values].
    """

    values: NDArray[np.float32]

    @property
    def rows(self) -> int:
        """Tokens from top to bottom."""
        return int(self.values.shape[0])

    @property
    def columns(self) -> int:
        """Tokens from left to right."""
        return int(self.values.shape[1])

    @property
    def tokens(self) -> int:
        """How many tokens the text branch reads for it."""
        return self.rows * self.columns


def grid(height: int, width: int, vision: Vision, name: str = "image") -> tuple[int, int]:
    """Rows and columns of tokens for an image of so many pixels: its proportions nearly kept, and
    its size within what the model reads.

    Raises:
        RequestError: it is far too long for its width.
    """
    if max(height, width) > MOST_ASPECT * min(height, width):
        raise RequestError(
            f"{name} has {width} x {height} pixels: the longer side may be at most {MOST_ASPECT} "
            "times the shorter one",
            hint="cut it",
        )
    side = vision.patch_size * vision.merge_size
    rows, columns = round(height / side), round(width / side)
    if rows * columns * side**2 > vision.max_pixels:
        shrink = math.sqrt(height * width / vision.max_pixels)
        rows = max(1, math.floor(height / shrink / side))
        columns = max(1, math.floor(width / shrink / side))
    elif rows * columns * side**2 < vision.min_pixels:
        grow = math.sqrt(vision.min_pixels / (height * width))
        rows, columns = math.ceil(height * grow / side), math.ceil(width * grow / side)
    return rows, columns


def windows(rows: int, columns: int, vision: Vision) -> int:
    """Say how many windows of the tower a grid of tokens has, those it does not fill among them."""
    return math.ceil(rows / vision.window) * math.ceil(columns / vision.window)


@dataclass(frozen=True)
class Limits:
    """The largest image, after it was made to fit.

    Attributes:
        tokens: that the text branch reads.
        windows: of the tower.
        side: tokens of the longer side.
    """

    tokens: int
    windows: int
    side: int


def limits(vision: Vision) -> Limits:
    """Say how large images become at most."""
    tokens = vision.max_pixels // (vision.patch_size * vision.merge_size) ** 2
    grids = [
        (rows, min(tokens // rows, MOST_ASPECT * (rows + 1)))
        for rows in range(1, math.isqrt(tokens) + 1)
    ]
    most = max(windows(rows, columns, vision) for rows, columns in grids)
    return Limits(tokens, most, max(columns for _, columns in grids))


def fit(image: Image.Image, vision: Vision, name: str = "image") -> Image.Image:
    """Return an RGB image as small as the model makes it, and no larger than it was. Its patches
    are the same.

    Raises:
        RequestError: it is far too long for its width.
    """
    rows, columns = grid(image.height, image.width, vision, name)
    side = vision.patch_size * vision.merge_size
    if image.height * image.width <= rows * columns * side**2:
        return image
    if max(rows, columns) > MOST_ASPECT * min(rows, columns):  # by rounding
        return image
    return image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)


def patches(image: Image.Image, vision: Vision, name: str = "image") -> Patches:
    """Return the patches of an RGB image.

    Raises:
        RequestError: it is far too long for its width.
    """
    return _patches(image, *grid(image.height, image.width, vision, name), vision)


def square_patches(image: Image.Image, side: int, vision: Vision) -> Patches:
    """Return the patches of an RGB image on the grid that the model draws on: what is not square is
    cut at its middle.

    Args:
        side: tokens of the grid's side.
    """
    return _patches(middle(image), side, side, vision)


def middle(image: Image.Image) -> Image.Image:
    """Return the largest square in the middle of an image."""
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    return image.crop((left, top, left + edge, top + edge))


def _patches(image: Image.Image, rows: int, columns: int, vision: Vision) -> Patches:
    side = vision.patch_size * vision.merge_size
    resized = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized, np.float64) * vision.rescale_factor
    pixels = pixels.astype(np.float32)
    mean, std = (np.array(values, np.float32) for values in (vision.image_mean, vision.image_std))
    pixels = ((pixels - mean) / std).astype(np.float32)
    patch, merge = vision.patch_size, vision.merge_size
    # rows, merged rows, pixel rows, columns, merged columns, pixel columns, colours
    split = pixels.reshape(rows, merge, patch, columns, merge, patch, 3)
    ordered = split.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    frames: NDArray[np.float32] = np.repeat(ordered, vision.temporal_patch_size, axis=5)
    return Patches(frames.reshape(rows, columns, merge**2, -1))
