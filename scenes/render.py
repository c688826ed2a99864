"""Pixels: flat shapes with anti-aliased edges on a flat background, by numpy and pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from scenes.layout import SIDE
from scenes.world import BACKGROUNDS, COLOURS, Placed

_FINE = 4  # samples per pixel and axis
ARM = 0.36  # width of a cross's arm


def _outline(shape: str, x: float, y: float, size: float) -> list[tuple[float, float]]:
    low_x, low_y, high_x, high_y = x - size / 2, y - size / 2, x + size / 2, y + size / 2
    if shape == "square":
        return [(low_x, low_y), (high_x, low_y), (high_x, high_y), (low_x, high_y)]
    if shape == "triangle":
        return [(x, low_y), (high_x, high_y), (low_x, high_y)]
    arm = size * ARM / 2
    return [
        (x - arm, low_y), (x + arm, low_y), (x + arm, y - arm), (high_x, y - arm),
        (high_x, y + arm), (x + arm, y + arm), (x + arm, high_y), (x - arm, high_y),
        (x - arm, y + arm), (low_x, y + arm), (low_x, y - arm), (x - arm, y - arm),
    ]  # fmt: skip


def render(objects: Sequence[Placed], background: str) -> NDArray[np.uint8]:
    """uint8[128, 128, 3] image of the objects, later ones on top."""
    image = np.empty((SIDE, SIDE, 3), np.float32)
    image[:] = BACKGROUNDS[background]
    for thing in objects:
        left = max(0, int(thing.x - thing.size / 2) - 1)
        top = max(0, int(thing.y - thing.size / 2) - 1)
        extent = int(thing.size) + 4
        x, y = (thing.x - left) * _FINE, (thing.y - top) * _FINE
        size = thing.size * _FINE
        mask = Image.new("L", (extent * _FINE, extent * _FINE), 0)
        draw = ImageDraw.Draw(mask)
        if thing.shape == "circle":
            draw.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=255)
        else:
            draw.polygon(_outline(thing.shape, x, y, size), fill=255)
        cover = np.asarray(mask.reduce(_FINE), np.float32)[..., None] / 255
        window = image[top : top + extent, left : left + extent]
        cover = cover[: window.shape[0], : window.shape[1]]
        window += cover * (np.array(COLOURS[thing.colour], np.float32) - window)
    return np.round(image).astype(np.uint8)
