"""The scorer: reads an image with classical image processing and judges it against a meaning.

Deterministic and free of learned parts, so a score means the same on every machine. An image
passes only if it holds exactly the objects that were asked for, and nothing else.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import regionprops

from scenes.layout import LARGE, MEDIUM, SMALL
from scenes.render import ARM
from scenes.world import BACKGROUNDS, COLOURS, SHAPES, Spec

FOREGROUND = 70.0  # RGB distance from the background; no palette colour comes closer
SMALLEST = 40  # px; less is texture, not an object
OVERLAP = 0.75  # intersection over union with the ideal shape in the same box
PURITY = 0.85  # share of an object's inner pixels that must carry its colour


@dataclass(frozen=True)
class Found:
    """One object in an image; shape or colour is None where it is none that the world knows."""

    shape: str | None
    colour: str | None
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Reading:
    """All that an image holds; the background is None where it is no known colour."""

    background: str | None
    objects: tuple[Found, ...]


@dataclass(frozen=True)
class Verdict:
    """`reason` says in words what is wrong, and is empty for a correct image."""

    correct: bool
    reason: str = ""


def _nearest(
    pixels: NDArray[np.float32], palette: dict[str, tuple[int, int, int]]
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Index of the nearest palette colour per pixel, and its RGB distance."""
    table = np.asarray(tuple(palette.values()), np.float32)
    distance = np.linalg.norm(pixels[..., None, :] - table, axis=-1)
    return distance.argmin(-1), distance.min(-1)


@cache
def _ideal(shape: str, height: int, width: int) -> NDArray[np.bool_]:
    """Return the shape drawn to fill a box of this size."""
    rows, columns = np.mgrid[:height, :width]
    y, x = (rows + 0.5) / height - 0.5, (columns + 0.5) / width - 0.5
    if shape == "square":
        return np.ones((height, width), bool)
    if shape == "circle":
        return x**2 + y**2 <= 0.25
    if shape == "triangle":
        return np.abs(x) <= (y + 0.5) / 2
    return np.minimum(np.abs(x), np.abs(y)) <= ARM / 2


def _shape(filled: NDArray[np.bool_]) -> str | None:
    """Return the shape that overlaps best with an object cut out at its bounding box."""
    height, width = filled.shape
    if not 0.75 < width / height < 1.34:
        return None
    overlap = {
        shape: float((filled & ideal).sum() / (filled | ideal).sum())
        for shape, ideal in ((shape, _ideal(shape, height, width)) for shape in SHAPES)
    }
    best = max(overlap, key=lambda shape: overlap[shape])
    return best if overlap[best] >= OVERLAP else None


def read(image: NDArray[np.uint8]) -> Reading:
    """Return what a uint8[H, W, 3] image holds."""
    pixels = image.astype(np.float32)
    rim = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                          pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])  # fmt: skip
    ground = np.median(rim, axis=0)
    index, distance = _nearest(ground, BACKGROUNDS)
    background = tuple(BACKGROUNDS)[int(index)] if distance < 50 else None
    # Half of the way from background to object is the edge, whatever the contrast.
    colour_index, colour_distance = _nearest(pixels, COLOURS)
    from_ground = np.linalg.norm(pixels - ground, axis=-1)
    mask = (from_ground > FOREGROUND) | ((from_ground > 50) & (from_ground > colour_distance))
    labels, _ = ndimage.label(mask)
    objects = []
    for region in regionprops(labels):
        if region.area < SMALLEST:
            continue
        top, left, bottom, right = region.bbox
        height, width = bottom - top, right - left
        member = labels == region.label
        inner = ndimage.binary_erosion(member, iterations=2)
        votes = np.bincount(colour_index[inner if inner.any() else member], minlength=len(COLOURS))
        typical = np.median(pixels[inner if inner.any() else member], axis=0)
        pure = votes.max() >= PURITY * votes.sum()
        close = np.linalg.norm(typical - tuple(COLOURS.values())[votes.argmax()]) < 60
        objects.append(
            Found(
                _shape(region.image),
                tuple(COLOURS)[votes.argmax()] if pure and close else None,
                (left + right) / 2,
                (top + bottom) / 2,
                (width + height) / 2,
            )
        )
    return Reading(background, tuple(objects))


def _relation_holds(relation: str, first: Found, second: Found) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    ahead = {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation]
    aside = dy if relation in ("left", "right") else dx
    return ahead > 10 and ahead > abs(aside)


def judge(spec: Spec, image: NDArray[np.uint8]) -> Verdict:
    """Say whether the image shows `spec` exactly. Unnamed attributes may take any known value."""
    reading = read(image)
    if reading.background is None:
        return Verdict(False, "the background is no known colour")
    if spec.background and reading.background != spec.background:
        return Verdict(False, f"the background is {reading.background}, not {spec.background}")
    if any(o.shape is None or o.colour is None for o in reading.objects):
        return Verdict(False, "an object is no known shape or colour")
    wanted = [t for t in spec.things for _ in range(spec.count)]
    if len(reading.objects) != len(wanted):
        return Verdict(False, f"{len(reading.objects)} objects, not {len(wanted)}")
    if Counter(o.shape for o in reading.objects) != Counter(t.shape for t in wanted):
        return Verdict(False, "wrong shapes")
    orders = [reading.objects]
    if len(spec.things) == 2:
        orders.append(reading.objects[::-1])
    reason = "wrong colours"
    for objects in orders:
        pairs = list(zip(wanted, objects, strict=True))
        if any(t.shape != o.shape or (t.colour and t.colour != o.colour) for t, o in pairs):
            continue
        if spec.relation and not _relation_holds(spec.relation, objects[0], objects[1]):
            reason = f"the first is not {spec.relation} of the second"
            continue
        if spec.size and not _size_holds(spec.size, objects[0].size):
            reason = f"the object is not {spec.size}"
            continue
        return Verdict(True)
    return Verdict(False, reason)


def _size_holds(size: str, extent: float) -> bool:
    """Small and large are told from medium at the midpoints between the canonical sizes."""
    return extent < (SMALL + MEDIUM) / 2 if size == "small" else extent > (MEDIUM + LARGE) / 2
