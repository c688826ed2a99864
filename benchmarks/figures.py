"""Timings of many images -> percentiles and ratios."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)
# Sums over engines; the reference, which has none, gives `mllm` itself.
SUMS = ("mllm", "total")


def summarise(images: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Per part of the image: percentiles, extremes and count, in seconds.

    `host_overhead` is the median share of an image that no engine accounts for. `median_image` is
    the one in the middle by its total: its parts add up, which medians do not.
    """
    parts: dict[str, Any] = {}
    for name in images[0]:
        seconds = np.array([image[name] for image in images])
        parts[name] = {f"p{p}": float(np.percentile(seconds, p)) for p in PERCENTILES}
        parts[name] |= {"min": float(seconds.min()), "max": float(seconds.max())}
    middle = sorted(images, key=lambda image: image["total"])[(len(images) - 1) // 2]
    found = {"images": len(images), "seconds": parts, "median_image": dict(middle)}
    engines = bars(images[0])
    if "visual_decode" not in engines:
        return found
    shares = [1 - sum(image[name] for name in engines) / image["total"] for image in images]
    return {**found, "host_overhead": float(np.median(shares))}


def bars(parts: Iterable[str]) -> list[str]:
    """Return the parts that add up to an image: the engines, or, where there are none, the MLLM and
    the rest."""
    engines = [name for name in parts if name not in SUMS]
    return engines if "visual_decode" in engines else ["mllm", *engines]


def ratios(
    ours: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Return the other's median over ours: above 1, ours is faster."""

    def median(images: Sequence[Mapping[str, float]], part: str) -> float:
        return float(np.median([image[part] for image in images]))

    return {
        "mllm": median(other, "mllm") / median(ours, "mllm"),
        "image": median(other, "total") / median(ours, "total"),
    }
