"""Timings of many images -> percentiles, ratios, a table for the terminal, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)
# Sums over engines; the reference, which has none, gives `mllm` itself.
SUMS = ("mllm", "total")


def summarise(images: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Per part of the image: percentiles, extremes and count, in seconds.

    `host_overhead` is the share of the median image that no engine accounts for.
    """
    parts: dict[str, Any] = {}
    for name in images[0]:
        seconds = np.array([image[name] for image in images])
        parts[name] = {f"p{p}": float(np.percentile(seconds, p)) for p in PERCENTILES}
        parts[name] |= {"min": float(seconds.min()), "max": float(seconds.max())}
    found = {"images": len(images), "seconds": parts}
    engines = bars(images[0])
    if "visual_decode" not in engines:
        return found
    shares = [1 - sum(image[name] for name in engines) / image["total"] for image in images]
    return {**found, "host_overhead": float(np.median(shares))}


def bars(parts: Iterable[str]) -> list[str]:
    """The parts that add up to an image: the engines, or, where there are none, the MLLM and the
    rest."""
    engines = [name for name in parts if name not in SUMS]
    return engines if "visual_decode" in engines else ["mllm", *engines]


def ratios(
    ours: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """The other's median over ours: above 1, ours is faster."""

    def median(images: Sequence[Mapping[str, float]], part: str) -> float:
        return float(np.median([image[part] for image in images]))

    return {
        "mllm": median(other, "mllm") / median(ours, "mllm"),
        "image": median(other, "total") / median(ours, "total"),
    }


def table(record: Mapping[str, Any]) -> str:
    """The record as a person reads it."""
    lines = [_machine(record["machine"]), _request(record["request"]), ""]
    for contender in record["contenders"]:
        memory = contender["peak_memory_bytes"] / 2**20
        lines.append(
            f"{contender['name']}: loads in {contender['load_seconds']:.2f} s, first image "
            f"{contender['first_image_seconds']:.2f} s, peak memory {memory:.0f} MiB"
        )
        steps = contender["steps"]
        for name, part in contender["seconds"].items():
            per_step = (
                f"   {1000 * part['p50'] / steps[name]:.2f} ms a step" if name in steps else ""
            )
            lines.append(
                f"  {name:15} p50 {_ms(part['p50'])}  p90 {_ms(part['p90'])}  "
                f"p99 {_ms(part['p99'])}  {_ms(part['min'])} … {_ms(part['max'])}{per_step}"
            )
        if "host_overhead" in contender:
            lines.append(f"  host overhead   {100 * contender['host_overhead']:.2f} % of an image")
        for batch, rate in contender["images_per_second"].items():
            lines.append(f"  batch {batch:9} {rate:.2f} images a second")
        lines.append("")
    for name, ratio in record["ratio_by_contender"].items():
        ours = record["contenders"][0]["name"]
        lines.append(f"{name} over {ours}: MLLM {ratio['mllm']:.2f}x, image {ratio['image']:.2f}x")
    return "\n".join(lines).rstrip()


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Stacked bars: where the median image of each contender goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.7 * len(record["contenders"])))
    order = list(dict.fromkeys(n for c in record["contenders"] for n in bars(c["seconds"])))
    labels = [contender["name"] for contender in record["contenders"]]
    ends = [0.0] * len(labels)
    for name in order:
        widths = [
            1000 * c["seconds"][name]["p50"] if name in bars(c["seconds"]) else 0.0
            for c in record["contenders"]
        ]
        axes.barh(labels, widths, left=ends, label=name, height=0.6)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("ms for one image (median)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    figure.tight_layout(rect=(0, 0, 1, 0.8))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:9.2f} ms"


def _machine(machine: Mapping[str, Any]) -> str:
    cpu = machine["cpu"]
    gpu = f", {machine['gpu']['name']}" if "gpu" in machine else ""
    return f"{cpu['name']}, {cpu['cores']} cores{gpu}"


def _request(request: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in request.items())
