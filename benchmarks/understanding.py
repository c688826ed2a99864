"""How well a set sees: exact descriptions of renders that nobody has trained on, and the round trip
from a prompt to an image to words.

    python -m benchmarks.understanding --engines DIR [--limit N] [--against DIR] [--transformers]

The descriptions name every object with colour, shape, place and size, so "exact" means every word.
The renders are of the bundled model's world, so the set must be built from
engines/checkpoints/scenes. `--transformers` has the checkpoint describe the same renders in
float32, `--against DIR` another set.

In the round trip each of the 300 held-out prompts is drawn, the image is described, and the scene
that the words name is rendered again: the scorer then tells whether it is what the prompt asked.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.arguments import count, new_file
from benchmarks.machine import describe as machine
from benchmarks.quality import chosen, draw
from bifrost_rt import Generator, command
from scenes.captions import describe, parse
from scenes.layout import place, scatter
from scenes.render import render
from scenes.sampling import training_spec
from scenes.scorer import judge
from scenes.world import BACKGROUNDS

RENDERS = 300
SEED = 20261126
KINDS = ("scenes", "anywhere")  # as prompts ask for, with jitter; objects anywhere, up to four
TOKENS = 64  # more than the longest description has
CHECKPOINT = Path("engines/checkpoints/scenes")

Pixels = NDArray[np.uint8]
Describe = Callable[[Pixels], str]


@dataclass(frozen=True)
class Render:
    """An image, the words that describe it exactly, and which of `KINDS` it is of."""

    pixels: Pixels
    words: str
    kind: str


def fresh(number: int) -> list[Render]:
    """Return renders that no training has seen, of both kinds by turns."""
    rng, found = np.random.default_rng(SEED), []
    for i in range(number):
        spec = training_spec(rng)
        objects, background = place(spec, rng), spec.drawn_background
        if i % 2:
            objects = scatter(rng, int(rng.integers(1, 5)))
            background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        words = describe(objects, background)
        found.append(Render(render(objects, background), words, KINDS[i % 2]))
    return found


def parts_right(words: str, truth: str) -> dict[str, bool]:
    """Return what of a description is right: the background, how many objects, their colours and
    shapes, and all of it."""
    said, wanted = parse(words), parse(truth)
    assert wanted is not None
    if said is None:
        return dict.fromkeys(("background", "number", "colours", "shapes", "exact"), False)
    (objects, background), (expected, behind) = said, wanted
    return {
        "background": background == behind,
        "number": len(objects) == len(expected),
        "colours": sorted(o.colour for o in objects) == sorted(o.colour for o in expected),
        "shapes": sorted(o.shape for o in objects) == sorted(o.shape for o in expected),
        "exact": words == truth,
    }


def with_set(generator: Generator) -> Describe:
    """Describe with an engine set, the likeliest words."""
    return lambda pixels: generator.describe(pixels, max_new_tokens=TOKENS).text


def with_transformers(checkpoint: Path) -> Describe:
    """Describe with transformers, in float32, the likeliest words."""
    import torch
    from PIL import Image
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from training.template import ask_for_words

    mllm = checkpoint / "mllm"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(mllm, dtype=torch.float32)
    trained: dict[str, torch.Tensor] = {}
    for file in sorted((checkpoint / "bifrost").glob("*.safetensors")):
        trained |= load_file(file)
    prefix, text = "vision_language_model.model.", model.model.language_model
    own = text.state_dict().keys()
    named = {name.removeprefix(prefix): t.float() for name, t in trained.items()}
    text.load_state_dict({n: t for n, t in named.items() if n in own}, strict=False)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(mllm)
    processor = Qwen2VLImageProcessorPil.from_pretrained(mllm)

    def say(pixels: Pixels) -> str:
        seen = processor(images=Image.fromarray(pixels), return_tensors="pt")
        _, rows, columns = seen["image_grid_thw"][0].tolist()
        merged = rows * columns // processor.merge_size**2
        ids = torch.tensor([tokenizer(ask_for_words(merged)).input_ids])
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
                max_new_tokens=TOKENS,
                do_sample=False,
                **seen,
            )
        return str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True))

    return say


def look(renders: Sequence[Render], say: Describe) -> tuple[dict[str, Any], list[str]]:
    """Describe every render: shares in percent by kind, seconds an image, and the words."""
    began = time.perf_counter()
    words = [say(one.pixels) for one in renders]
    seconds = (time.perf_counter() - began) / len(renders)
    right = [parts_right(said, one.words) for said, one in zip(words, renders, strict=True)]
    shares = {}
    for kind in KINDS:
        of = [r for r, one in zip(right, renders, strict=True) if one.kind == kind]
        shares[kind] = {name: percent([r[name] for r in of]) for name in right[0]}
    return {**shares, "seconds": round(seconds, 4)}, words


def round_trip(generator: Generator, limit: int | None) -> dict[str, Any]:
    """Draw the held-out prompts, describe the images, and judge both."""
    say, drawn, told = with_set(generator), [], []
    for item in chosen(limit):
        pixels = draw(generator, item, "on", {})[0]
        drawn.append(judge(item.spec, pixels).correct)
        said = parse(say(pixels))
        told.append(said is not None and judge(item.spec, render(*said)).correct)
    both = [t for d, t in zip(drawn, told, strict=True) if d]
    return {
        "prompts": len(drawn),
        "drawn": percent(drawn),
        "drawn_and_described": percent(told),
        "described_of_those_drawn": percent(both),
    }


def percent(right: Sequence[bool]) -> float:
    """Share that is right, in percent."""
    return round(100 * sum(right) / max(1, len(right)), 1)


def table(result: dict[str, Any]) -> str:
    """Return the result as lines for a person."""
    names = ("exact", "number", "colours", "shapes", "background")
    lines = ["| | " + " | ".join(("renders", *names)) + " |", "|---|" + "---|" * (len(names) + 1)]
    for who, found in result["descriptions"].items():
        for kind in KINDS:
            shares = " | ".join(str(found[kind][name]) for name in names)
            lines.append(f"| {who} | {kind} | {shares} |")
    for who, equal in result["equal"].items():
        lines.append(f"\nwords equal to those of {who}: {equal} %")
    if trip := result["round_trip"]:
        lines.append(
            f"\nround trip over {trip['prompts']} prompts: drawn {trip['drawn']} %, drawn and "
            f"described {trip['drawn_and_described']} %, described of those that were drawn right "
            f"{trip['described_of_those_drawn']} %"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.understanding", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--engines", type=Path, required=True, help="the set to measure")
    parser.add_argument("--limit", type=count, default=RENDERS, help="renders, and prompts (300)")
    parser.add_argument("--backend", help="default: the one that the set was built for")
    parser.add_argument("--against", type=Path, action="append", default=[], help="another set")
    parser.add_argument(
        "--transformers", action="store_true", help="describe with transformers too"
    )
    parser.add_argument("--no-round-trip", action="store_true", help="descriptions alone")
    parser.add_argument("--json", type=new_file)
    given = parser.parse_args()
    renders = fresh(given.limit)
    result: dict[str, Any] = {"machine": machine(), "renders": len(renders), "descriptions": {}}
    result["equal"] = {}
    with Generator(given.engines, backend=given.backend) as generator:
        name = f"{generator.manifest.name}, {generator.backend.name}"
        result["descriptions"][name], words = look(renders, with_set(generator))
        print(f"{name}: described", file=sys.stderr)
        others: list[tuple[str, Describe]] = []
        if given.transformers:
            others.append(("transformers, float32", with_transformers(CHECKPOINT)))
        opened = [Generator(folder) for folder in given.against]
        others += [(f"{o.manifest.name}, {o.backend.name}", with_set(o)) for o in opened]
        for who, say in others:
            result["descriptions"][who], theirs = look(renders, say)
            equal = [a == b for a, b in zip(words, theirs, strict=True)]
            result["equal"][who] = percent(equal)
            print(f"{who}: described", file=sys.stderr)
        for other in opened:
            other.close()
        result["round_trip"] = None if given.no_round_trip else round_trip(generator, given.limit)
    print(table(result))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
