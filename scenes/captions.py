"""Wordings: every meaning can be said in several ways, and a scene can be described exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scenes.world import BACKGROUNDS, COLOURS, SHAPES, Placed, Spec, Thing

OPENINGS = ("a photo of ", "a picture of ", "a drawing of ", "")
COUNT_WORDS = ("one", "two", "three", "four")
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
STEPS = "abcdefghijklmnopq"  # a letter for every 8 px: one token, where two digits would be three
_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _name(thing: Thing, size: str | None = None) -> str:
    return " ".join(word for word in (size, thing.colour, thing.shape) if word)


def caption(spec: Spec, rng: np.random.Generator) -> str:
    """One wording of `spec`, drawn by `rng`."""
    text = OPENINGS[rng.integers(len(OPENINGS))]
    first = spec.things[0]
    if spec.family == "counting":
        colour = f"{first.colour} " if first.colour else ""
        noun = first.shape if spec.count == 1 else _PLURALS[first.shape]
        text += f"{COUNT_WORDS[spec.count - 1]} {colour}{noun}"
    elif len(spec.things) == 1:
        text += _article(_name(first, spec.size))
    else:
        words = RELATION_WORDS[spec.relation] if spec.relation else ("and",)
        between = words[rng.integers(len(words))]
        text += f"{_article(_name(first))} {between} {_article(_name(spec.things[1]))}"
    if spec.background:
        text += f" on {_article(spec.background)} background"
    return text


def describe(objects: Sequence[Placed], background: str) -> str:
    """Return the exact description: every object with its place (x, y) and size in steps of 8 px.

    What the captioner learns to say, so that its patch latents hold colour, shape, place and size.
    """
    said = [
        " ".join((o.colour, o.shape, *(STEPS[round(v / 8)] for v in (o.x, o.y, o.size))))
        for o in objects
    ]
    return f"{background} background, " + ", ".join(sorted(said))


def parse(words: str) -> tuple[list[Placed], str] | None:
    """Read the objects and the background of an exact description; None where it is none."""
    head, _, rest = words.partition(" background, ")
    if head not in BACKGROUNDS:
        return None
    objects = []
    for part in rest.split(", "):
        said = part.split(" ")
        if len(said) != 5 or said[0] not in COLOURS or said[1] not in SHAPES:
            return None
        if not all(letter in STEPS for letter in said[2:]):
            return None
        x, y, size = (8.0 * STEPS.index(letter) for letter in said[2:])
        objects.append(Placed(said[1], said[0], x, y, size))
    return objects, head
