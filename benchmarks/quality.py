"""How many images show what was asked: the scorer on 300 held-out prompts, through the runtime.

    python -m benchmarks.quality --engines DIR [--limit N] [--think] [--json FILE] [--sheet FILE]

The scorer (scenes/scorer.py) knows the bundled model's world only, so the engine set must be built
from engines/checkpoints/scenes. Every prompt has its own fixed seed; the same command gives the
same images. `--bridge off` runs without the ControlNet and `--bridge shuffled` gives it each
image's own latents in wrong places: the difference to the default is what the bridge
contributes. With `--think` the MLLM answers every prompt first, and its answer is drawn.
`--kept-out` takes only combinations that no training prompt has. `--against DIR` compares with
another set's images for the same seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.arguments import count, new_file
from bifrost_rt import Generator, command
from scenes.captions import parse
from scenes.heldout import PER_FAMILY, HeldOut, heldout
from scenes.render import render
from scenes.scorer import judge
from scenes.world import FAMILIES, Spec

BRIDGES = ("on", "off", "shuffled")
SAME = 100.0  # dB, what identical images count as in the mean
FRAME = 3  # px of the contact sheet's frames


@dataclass(frozen=True)
class Drawn:
    """One prompt's outcome; `psnr` and `ssim` are against the other set, where there is one, and
    `thought` is what was drawn with `--think`, and `thought_right` whether it states the scene."""

    prompt: str
    family: str
    seed: int
    kept_out: bool
    correct: bool
    reason: str
    psnr: float | None = None
    ssim: float | None = None
    thought: str | None = None
    thought_right: bool | None = None


def chosen(limit: int | None, kept_out: bool = False) -> list[HeldOut]:
    """Return the first prompts of every family, `limit` in all; None takes the whole list.
    `kept_out` leaves those combinations of it that training prompts do not have."""
    each = PER_FAMILY if limit is None else max(1, math.ceil(limit / len(FAMILIES)))
    items = heldout()
    picked = [
        items[family * PER_FAMILY + i] for i in range(each) for family in range(len(FAMILIES))
    ]
    return [item for item in picked[:limit] if item.kept_out or not kept_out]


def draw(
    generator: Generator, item: HeldOut, bridge: str, options: Mapping[str, Any]
) -> tuple[NDArray[np.uint8], str | None]:
    """Return the image of one prompt, uint8 [H, W, 3], and what was thought of it."""
    arguments = dict(options)
    steps = arguments.get("decoding_steps") or generator.manifest.defaults.decoding_steps
    shuffled = np.random.default_rng(item.seed)

    def misplace(
        _: Generator, step: int, timestep: float | None, tensors: dict[str, Any]
    ) -> dict[str, Any] | None:
        if "tokens" not in tensors or step != steps - 1:
            return None
        return {"tokens": shuffled.permutation(tensors["tokens"], axis=1)}

    if bridge == "off":
        arguments["controlnet_conditioning_scale"] = 0.0
    if bridge == "shuffled":
        arguments["callback_on_step_end"] = misplace
    result = generator.run(item.prompt, seed=item.seed, output_type="np", **arguments)
    image: NDArray[np.uint8] = result.image
    return image, result.thought


def states(thought: str, spec: Spec) -> bool:
    """Say whether a layout in words, rendered, is the scene that was asked for."""
    layout = parse(thought)
    return layout is not None and judge(spec, render(*layout)).correct


def compare(image: NDArray[np.uint8], other: NDArray[np.uint8]) -> tuple[float, float]:
    """PSNR in dB and SSIM of two images."""
    same = np.array_equal(image, other)
    psnr = SAME if same else float(peak_signal_noise_ratio(other, image, data_range=255))
    return psnr, float(structural_similarity(other, image, channel_axis=2, data_range=255))


def closeness(
    images: Sequence[NDArray[np.uint8]], others: Sequence[NDArray[np.uint8]]
) -> dict[str, float]:
    """Of images to others of the same prompts: PSNR in dB and SSIM."""
    pairs = [compare(mine, other) for mine, other in zip(images, others, strict=True)]
    return {
        "psnr_mean": round(float(np.mean([psnr for psnr, _ in pairs])), 1),
        "psnr_min": round(min(psnr for psnr, _ in pairs), 1),
        "ssim_mean": round(float(np.mean([ssim for _, ssim in pairs])), 4),
    }


def cells(close: Mapping[str, float]) -> list[str]:
    """Return `closeness` in a table."""
    return [f"{close['psnr_mean']} dB", f"{close['psnr_min']} dB", f"{close['ssim_mean']:.3f}"]


def measure(
    generator: Generator,
    items: list[HeldOut],
    bridge: str,
    options: Mapping[str, Any],
    other: Generator | None = None,
) -> tuple[list[Drawn], list[NDArray[np.uint8]]]:
    """Draw and judge every item; with `other`, compare with its images."""
    drawn, images = [], []
    started = time.monotonic()
    for i, item in enumerate(items):
        image, thought = draw(generator, item, bridge, options)
        verdict = judge(item.spec, image)
        psnr, ssim = (
            compare(image, draw(other, item, bridge, options)[0]) if other else (None, None)
        )
        drawn.append(
            Drawn(item.prompt, item.spec.family, item.seed, item.kept_out,
                  verdict.correct, verdict.reason, psnr, ssim, thought,
                  None if thought is None else states(thought, item.spec))
        )  # fmt: skip
        images.append(image)
        if (i + 1) % 25 == 0 or i + 1 == len(items):
            pace = (time.monotonic() - started) / (i + 1)
            print(f"{i + 1}/{len(items)} images, {pace:.2f} s each", file=sys.stderr)
    return drawn, images


def percent(drawn: list[Drawn]) -> float:
    """Share that is right, in percent."""
    return round(100 * sum(d.correct for d in drawn) / max(1, len(drawn)), 1)


def report(drawn: list[Drawn], setting: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON document: overall, families, kept-out combinations, every prompt."""
    families = {f: [d for d in drawn if d.family == f] for f in FAMILIES}
    pairs = [(d.psnr, d.ssim) for d in drawn if d.psnr is not None and d.ssim is not None]
    thoughts = [d.thought_right for d in drawn if d.thought_right is not None]
    return {
        "setting": setting,
        "overall": percent(drawn),
        "thoughts_right": {"right": sum(thoughts), "of": len(thoughts)} if thoughts else None,
        "families": {f: percent(of) for f, of in families.items() if of},
        "combinations": {
            "kept_out": percent([d for d in drawn if d.kept_out]),
            "trained": percent([d for d in drawn if not d.kept_out]),
        },
        "against": {
            "psnr_mean": round(float(np.mean([p for p, _ in pairs])), 2),
            "psnr_min": round(min(p for p, _ in pairs), 2),
            "ssim_mean": round(float(np.mean([s for _, s in pairs])), 4),
        }
        if pairs
        else None,
        "prompts": [asdict(d) for d in drawn],
    }


def table(result: dict[str, Any], drawn: list[Drawn]) -> str:
    """Return the report as lines for a person."""
    shares = result["families"].items()
    rows = [(family, share, sum(d.family == family for d in drawn)) for family, share in shares]
    rows += [
        ("overall", result["overall"], len(drawn)),
        ("  kept-out combinations", result["combinations"]["kept_out"],
         sum(d.kept_out for d in drawn)),
    ]  # fmt: skip
    lines = [f"{name:24} {value:5.1f} %  of {count}" for name, value, count in rows]
    if thoughts := result["thoughts_right"]:
        lines.append(f"thoughts that state the scene: {thoughts['right']} of {thoughts['of']}")
    if found := result["against"]:
        lines.append(
            f"against the other set: PSNR {found['psnr_mean']} dB (lowest {found['psnr_min']}), "
            f"SSIM {found['ssim_mean']}"
        )
    return "\n".join(lines)


def sheet(drawn: list[Drawn], images: list[NDArray[np.uint8]], columns: int = 25) -> Image.Image:
    """All images, family by family: a green frame where right, a red one where not."""
    order = sorted(range(len(drawn)), key=lambda i: FAMILIES.index(drawn[i].family))
    framed = []
    for i in order:
        height, width, _ = images[i].shape
        frame = np.empty((height + 2 * FRAME, width + 2 * FRAME, 3), np.uint8)
        frame[:] = (0, 170, 0) if drawn[i].correct else (220, 0, 0)
        frame[FRAME:-FRAME, FRAME:-FRAME] = images[i]
        framed.append(frame)
    framed += [np.zeros_like(framed[0])] * (-len(framed) % columns)
    rows = [np.concatenate(framed[i : i + columns], 1) for i in range(0, len(framed), columns)]
    return Image.fromarray(np.concatenate(rows))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--engines", type=Path, required=True, help="the set to measure")
    parser.add_argument("--limit", type=count, help="this many prompts, evenly over the families")
    parser.add_argument("--kept-out", action="store_true", help="of these, kept-out combinations")
    parser.add_argument("--think", action="store_true", help="draw what the MLLM answers first")
    parser.add_argument("--bridge", choices=BRIDGES, default="on")
    parser.add_argument("--against", type=Path, help="another set: PSNR and SSIM to its images")
    parser.add_argument("--backend", help="default: the one that the set was built for")
    parser.add_argument("--steps", type=count, help="denoising steps")
    parser.add_argument("--decoding-steps", type=count)
    parser.add_argument("--scale", type=float, help="ControlNet scale")
    parser.add_argument("--json", type=new_file)
    parser.add_argument("--sheet", type=new_file)
    given = parser.parse_args()
    options = {
        name: value
        for name, value in (
            ("num_inference_steps", given.steps),
            ("decoding_steps", given.decoding_steps),
            ("controlnet_conditioning_scale", given.scale),
            ("think", given.think or None),
        )
        if value is not None
    }
    with Generator(given.engines, backend=given.backend) as generator:
        other = Generator(given.against) if given.against else None
        drawn, images = measure(
            generator, chosen(given.limit, given.kept_out), given.bridge, options, other
        )
        if other:
            other.close()
        setting = {
            "set": generator.manifest.name,
            "backend": generator.backend.name,
            "bridge": given.bridge,
            **options,
        }
    result = report(drawn, setting)
    print(table(result, drawn))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.sheet:
        sheet(drawn, images).save(given.sheet)
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
