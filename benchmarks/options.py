"""What each option that trades exactness for speed costs, and what it gains.

    python -m benchmarks.options [--engines DIR] [--limit N] [--json FILE]

The prompts of benchmarks.quality with the same seeds. Every prompt is drawn with each option in
turn before the next prompt, so a machine that slows down slows them all. PSNR and SSIM are against
the images without options; the speed-up is the median time of an image without over that with
them, of the whole image and of the part that the option changes. The table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.arguments import count, new_file
from benchmarks.quality import cells, chosen, closeness
from bifrost_rt import Generator, command, schedules
from bifrost_rt.generator import DEFAULT_SET
from scenes.heldout import HeldOut
from scenes.scorer import judge

COLUMNS = ("option", "MLLM", "denoising", "image", "overall", "PSNR mean", "PSNR lowest", "SSIM")
PARTS = {
    "MLLM": ("mllm_text", "visual_decode"),
    "denoising": ("denoise",),
    "image": ("total",),
}


def variants(decoding_steps: int, num_inference_steps: int) -> list[dict[str, int]]:
    """Return what is compared, as arguments of `Generator.run`; the first is exact. Fewer denoising
    steps are there for comparison: they cost what a cache interval of 2 and 3 costs."""
    few = [max(1, decoding_steps // n) for n in (2, 4, 8)]
    steps = [{"decoding_steps": n} for n in dict.fromkeys(few) if n < decoding_steps]
    cached = [{"cache_interval": n} for n in (2, 3, 4)]
    equal = [sum(schedules.computed_steps(num_inference_steps, n)) for n in (2, 3)]
    fewer = [{"num_inference_steps": n} for n in equal]
    both = [{**steps[0], **cached[0]}] if steps else []
    return [{}, *steps, *cached, *fewer, *both]


def draw(
    generator: Generator, items: Sequence[HeldOut], options: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a record for each option."""
    found: list[list[tuple[NDArray[np.uint8], dict[str, float], bool]]] = [[] for _ in options]
    for i, item in enumerate(items):
        for given, results in zip(options, found, strict=True):
            result = generator.run(item.prompt, seed=item.seed, output_type="np", **given)
            image = result.images[0]
            results.append((image, result.timings, judge(item.spec, image).correct))
        if (i + 1) % 25 == 0 or i + 1 == len(items):
            print(f"{i + 1}/{len(items)} prompts", file=sys.stderr)
    return [record(given, found[0], results) for given, results in zip(options, found, strict=True)]


def record(
    given: Mapping[str, int],
    exact: Sequence[tuple[NDArray[np.uint8], dict[str, float], bool]],
    drawn: Sequence[tuple[NDArray[np.uint8], dict[str, float], bool]],
) -> dict[str, Any]:
    """One option's line: speed-up, score, and difference to the exact images."""

    def seconds(results: Sequence[tuple[Any, dict[str, float], bool]], part: str) -> float:
        return float(np.median([sum(timings[e] for e in PARTS[part]) for _, timings, _ in results]))

    return {
        "option": dict(given),
        "speedup": {part: round(seconds(exact, part) / seconds(drawn, part), 2) for part in PARTS},
        "overall": round(100 * sum(right for *_, right in drawn) / len(drawn), 1),
        "images": len(drawn),
        **closeness([image for image, *_ in drawn], [image for image, *_ in exact]),
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; the first record is the exact one."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for i, r in enumerate(records):
        name = ", ".join(f"`{name}={value}`" for name, value in r["option"].items()) or "none"
        speed = [f"{r['speedup'][part]:.2f}" for part in PARTS]
        close = ["–"] * 3 if i == 0 else cells(r)
        lines.append("| " + " | ".join([name, *speed, f"{r['overall']} %", *close]) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.options", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--engines", type=Path, default=DEFAULT_SET, help="the demo model's")
    parser.add_argument("--backend", help="default: the fastest that is installed")
    parser.add_argument("--limit", type=count, help="this many prompts, evenly over the families")
    parser.add_argument("--json", type=new_file, help="write the record")
    given = parser.parse_args(arguments)
    with Generator(given.engines, backend=given.backend, prompt_cache=0) as generator:
        defaults = generator.manifest.defaults
        options = variants(defaults.decoding_steps, defaults.num_inference_steps)
        records = draw(generator, chosen(given.limit), options)
    print(table(records))
    if given.json:
        document = {"machine": machine.describe(), "options": records}
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
