"""How well a set edits: parts of fresh renders drawn anew, and what became of them and of the rest.

    python -m benchmarks.editing --engines DIR [--limit N] [--json FILE] [--sheet FILE]

The scorer (scenes/scorer.py) knows the bundled model's world only, so the engine set must be built
from engines/checkpoints/scenes. Every task has a render, a mask and a prompt of its own, from one
seed: an object is replaced, gets another colour, goes, or is added beside another. The mask is a
square around it, as somebody would paint it. The part is right where it holds what the prompt says
and nothing else; the rest is right where it holds what it held, in its place. PSNR is that of the
pixels whose tokens are kept, and 100 dB where all are equal. Further tasks, a quarter as many, put
one thing each of two renders together, and are right as a whole or not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.arguments import count, new_file
from benchmarks.machine import describe as machine
from benchmarks.quality import SAME
from benchmarks.understanding import percent
from bifrost_rt import Generator, command, masks
from bifrost_rt.composition import Box, Part
from scenes.captions import caption
from scenes.layout import PAIR_SIZE, SIDE, place
from scenes.render import render
from scenes.sampling import training_spec
from scenes.scorer import Found, judge, read
from scenes.world import COLOURS, SHAPES, UNSEEN_PAIRS, Placed, Spec, Thing, kept_out

TASKS = 200
SEED = 20261127
MARGIN = 7.0  # px of the mask around an object of usual size
MOVED = 4.0  # px by which an object that is kept may move or grow
FRAME = 3  # px of the contact sheet's frames
PARTS = ("part", "rest", "both")  # of a verdict

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Task:
    """An image, what is masked of it, and what the prompt asks for.

    Attributes:
        box: left, top, right, bottom in pixels.
        wanted: what the box is to hold; None: nothing.
        kept: what stands outside of it.
    """

    kind: str
    image: Pixels
    box: tuple[float, float, float, float]
    prompt: str
    wanted: Thing | None
    kept: Placed
    background: str

    def mask(self) -> Pixels:
        """White in the box."""
        painted = np.zeros((SIDE, SIDE), np.uint8)
        left, top, right, bottom = (round(edge) for edge in self.box)
        painted[max(0, top) : bottom, max(0, left) : right] = 255
        return painted

    def holds(self, found: Found) -> bool:
        """Say whether the middle of an object is in the box."""
        left, top, right, bottom = self.box
        return left <= found.x <= right and top <= found.y <= bottom


def unlike(rng: np.random.Generator, old: Thing, other: Thing) -> Thing:
    """Return a thing that differs from both in shape and colour."""
    free = [
        Thing(shape, colour)
        for shape in SHAPES
        for colour in COLOURS
        if shape not in (old.shape, other.shape)
        and colour not in (old.colour, other.colour)
        and (colour, shape) not in UNSEEN_PAIRS
    ]
    return free[rng.integers(len(free))]


def recoloured(rng: np.random.Generator, old: Thing, other: Thing) -> Thing:
    """Return the thing in a colour that neither has."""
    free = [
        colour
        for colour in COLOURS
        if colour not in (old.colour, other.colour) and (colour, old.shape) not in UNSEEN_PAIRS
    ]
    return replace(old, colour=free[rng.integers(len(free))])


# How the thing that is edited follows from it and the other; None where there is none afterwards.
KINDS: dict[str, Callable[[np.random.Generator, Thing, Thing], Thing | None]] = {
    "replace": unlike,
    "recolour": recoloured,
    "remove": lambda rng, old, other: None,
    "add": lambda rng, old, other: old,
}


def tasks(number: int) -> list[Task]:
    """Tasks of every kind by turns."""
    rng = np.random.default_rng(SEED)
    found: list[Task] = []
    while len(found) < number:
        spec = training_spec(rng)
        if spec.family == "position" and all(thing.colour for thing in spec.things):
            found.append(_task(rng, spec, list(KINDS)[len(found) % len(KINDS)]))
    return found


def _task(rng: np.random.Generator, spec: Spec, kind: str) -> Task:
    edited = int(rng.integers(2))
    objects = place(spec, rng)
    target, kept = objects[edited], objects[1 - edited]
    wanted = KINDS[kind](rng, spec.things[edited], spec.things[1 - edited])
    if wanted is None:
        asked = Spec("colours", (spec.things[1 - edited],), background=spec.background)
    else:
        things = list(spec.things)
        things[edited] = wanted
        asked = replace(spec, things=tuple(things))
    half = PAIR_SIZE / 2 + MARGIN
    box = (target.x - half, target.y - half, target.x + half, target.y + half)
    shown = (kept,) if kind == "add" else objects
    background = spec.drawn_background
    prompt = caption(asked, rng)
    return Task(kind, render(shown, background), box, prompt, wanted, kept, background)


def verdict(task: Task, edited: Pixels) -> dict[str, bool]:
    """Say whether the part, the rest, and both are right."""
    reading = read(edited)
    inside = [found for found in reading.objects if task.holds(found)]
    outside = [found for found in reading.objects if not task.holds(found)]
    if task.wanted is None:
        part = not inside
    else:
        wanted = (task.wanted.shape, task.wanted.colour)
        part = [(found.shape, found.colour) for found in inside] == [wanted]
    rest = reading.background == task.background and len(outside) == 1
    rest = rest and _unmoved(task.kept, outside[0])
    return {"part": part, "rest": rest, "both": part and rest}


def _unmoved(kept: Placed, found: Found) -> bool:
    same = (found.shape, found.colour) == (kept.shape, kept.colour)
    steps = (found.x - kept.x, found.y - kept.y, found.size - kept.size)
    return same and max(abs(step) for step in steps) <= MOVED


@dataclass(frozen=True)
class Two:
    """Two images of which one is composed: the first thing of the one, the second of the other.

    Attributes:
        boxes: the parts of the two, as `Generator.run` takes them.
        wanted: the scene that comes of them.
    """

    images: tuple[Pixels, Pixels]
    boxes: tuple[Box, Box]
    prompt: str
    wanted: Spec


HALVES: dict[str, tuple[Box, Box]] = {
    "left": ((0, 0, 0.5, 1), (0.5, 0, 1, 1)),
    "above": ((0, 0, 1, 0.5), (0, 0.5, 1, 1)),
}


def pairs(number: int) -> list[Two]:
    """Pairs of scenes whose things stand alike."""
    rng = np.random.default_rng(SEED + 1)
    found: list[Two] = []
    while len(found) < number:
        one, other = training_spec(rng), training_spec(rng)
        if any(
            spec.relation not in HALVES or not all(thing.colour for thing in spec.things)
            for spec in (one, other)
        ):
            continue
        other = replace(other, relation=one.relation, background=one.background)
        wanted = replace(one, things=(one.things[0], other.things[1]))
        first, second = wanted.things
        if wanted in (one, other) or kept_out(wanted):
            continue
        if first.shape == second.shape or first.colour == second.colour:
            continue
        assert one.relation is not None
        shown = [render(place(spec, rng), spec.drawn_background) for spec in (one, other)]
        prompt = caption(wanted, rng)
        found.append(Two((shown[0], shown[1]), HALVES[one.relation], prompt, wanted))
    return found


def compose(generator: Generator, asked: Sequence[Two]) -> dict[str, Any]:
    """Compose every pair: the share in percent that is right."""
    right = []
    for i, task in enumerate(asked):
        parts: list[Part] = list(zip(task.images, task.boxes, strict=True))
        (made,) = generator.run(task.prompt, compose=parts, seed=i, output_type="np").images
        right.append(judge(task.wanted, made).correct)
    return {"tasks": len(asked), "both": percent(right)}


def psnr_outside(task: Task, edited: Pixels, side: int) -> float:
    """dB between the image and what was made of it, where tokens are kept.

    Args:
        side: tokens of the grid's side.
    """
    cells = masks.touched(Image.fromarray(task.mask()), side)
    kept = ~np.kron(cells, np.ones((SIDE // side, SIDE // side), bool))
    off = (task.image[kept].astype(float) - edited[kept]) ** 2
    return float(10 * np.log10(255**2 / off.mean())) if off.any() else SAME


def measure(
    generator: Generator, asked: Sequence[Task], keep_pixels: bool
) -> tuple[dict[str, Any], list[Pixels]]:
    """Edit every render: shares in percent by kind, and the outputs."""
    side = round(generator.manifest.model.num_visual_tokens**0.5)
    verdicts, distances, outputs = [], [], []
    for i, task in enumerate(asked):
        (edited,) = generator.run(
            task.prompt,
            image=task.image,
            mask=task.mask(),
            seed=i,
            output_type="np",
            keep_pixels=keep_pixels,
        ).images
        outputs.append(edited)
        verdicts.append(verdict(task, edited))
        distances.append(psnr_outside(task, edited, side))
        if sys.stderr.isatty():
            print(f"\r{i + 1}/{len(asked)}", end="", file=sys.stderr, flush=True)
    found = {}
    for kind in (*KINDS, "all"):
        of = [i for i, task in enumerate(asked) if kind in (task.kind, "all")]
        if of:
            shares = {name: percent([verdicts[i][name] for i in of]) for name in PARTS}
            db = [distances[i] for i in of]
            found[kind] = {
                "tasks": len(of),
                **shares,
                "psnr_mean": round(float(np.mean(db)), 1),
                "psnr_least": round(min(db), 1),
            }
    return found, outputs


def table(found: dict[str, Any]) -> str:
    """Return the result as lines for a person."""
    names = ("tasks", *PARTS, "psnr_mean", "psnr_least")
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for kind, row in found.items():
        lines.append(f"| {kind} | " + " | ".join(str(row.get(name, "")) for name in names) + " |")
    return "\n".join(lines)


def sheet(asked: Sequence[Task], outputs: Sequence[Pixels], path: Path, columns: int = 6) -> None:
    """Save a sheet of tasks: the image, the image with its mask in gray, and what was made."""
    edge = SIDE + FRAME
    rows = -(-len(asked) // columns)
    canvas = Image.new("RGB", (columns * (3 * edge + 2 * FRAME), rows * edge), "white")
    for i, (task, edited) in enumerate(zip(asked, outputs, strict=True)):
        shown = np.where(task.mask()[..., None] > 0, task.image // 2 + 64, task.image)
        left, top = (i % columns) * (3 * edge + 2 * FRAME), (i // columns) * edge
        for j, pixels in enumerate((task.image, shown.astype(np.uint8), edited)):
            canvas.paste(Image.fromarray(pixels), (left + j * edge, top))
    canvas.save(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.editing", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--engines", type=Path, required=True, help="the set to measure")
    parser.add_argument("--limit", type=count, default=TASKS, help=f"tasks ({TASKS})")
    parser.add_argument("--backend", help="default: the one that the set was built for")
    parser.add_argument(
        "--no-keep-pixels", dest="keep", action="store_false", help="draw the whole image"
    )
    parser.add_argument("--json", type=new_file, help="write the result")
    parser.add_argument("--sheet", type=new_file, help="write a contact sheet of the first 36")
    given = parser.parse_args(arguments)
    asked = tasks(given.limit)
    with Generator(given.engines, backend=given.backend) as generator:
        found, outputs = measure(generator, asked, given.keep)
        found["compose"] = compose(generator, pairs(-(-given.limit // len(KINDS))))
        who = f"{generator.manifest.name}, {generator.backend.name}"
    print(f"{who}\n\n{table(found)}")
    if given.sheet:
        sheet(asked[:36], outputs[:36], given.sheet)
    if given.json:
        result = {"machine": machine(), "set": who, "keep_pixels": given.keep, "edits": found}
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
