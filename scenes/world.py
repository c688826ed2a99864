"""What exists in the world: shapes, colours, backgrounds, and what a prompt asks for.

A `Spec` is the meaning of one prompt. It is separate from wording (captions.py) and from pixels
(layout.py, render.py), so that one meaning can be worded, drawn and checked independently.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 50),
    "green": (30, 150, 60),
    "blue": (40, 90, 235),
    "purple": (140, 50, 180),
    "pink": (255, 125, 185),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (10, 10, 10),
    "gray": (130, 130, 130),
    "navy": (15, 25, 75),
    "brown": (110, 75, 45),
}
FAMILIES = ("single", "two", "counting", "colours", "position", "attribution")
RELATIONS = ("left", "right", "above", "below")
SIZES = ("small", "large")

# What a caption leaves open has one value, so that a caption determines its scene up to jitter:
# a regression head would otherwise learn the mean of all values, which is no scene at all.
DEFAULT_COLOUR = {"circle": "red", "square": "blue", "triangle": "green", "cross": "yellow"}
DEFAULT_BACKGROUND = "white"

# Never drawn together in training, alone or beside anything else.
UNSEEN_PAIRS = frozenset({("purple", "triangle"), ("orange", "square")})


@dataclass(frozen=True)
class Thing:
    """One kind of object; `colour` is None where the prompt does not name it."""

    shape: str
    colour: str | None = None

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}, expected one of {SHAPES}")
        if self.colour is not None and self.colour not in COLOURS:
            raise ValueError(f"unknown colour {self.colour!r}, expected one of {tuple(COLOURS)}")

    @property
    def drawn_colour(self) -> str:
        """The named colour, or the shape's own."""
        return self.colour or DEFAULT_COLOUR[self.shape]


@dataclass(frozen=True)
class Spec:
    """The meaning of a prompt: one thing `count` times, or two things and how they stand."""

    family: str
    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None
    background: str | None = None
    size: str | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}, expected one of {FAMILIES}")
        if len(self.things) not in (1, 2) or not 1 <= self.count <= 4:
            raise ValueError("a scene holds one or two kinds of things and counts 1 to 4")
        if self.relation is not None and (self.relation not in RELATIONS or len(self.things) != 2):
            raise ValueError(f"relation {self.relation!r} needs two things and one of {RELATIONS}")
        if self.background is not None and self.background not in BACKGROUNDS:
            raise ValueError(f"unknown background {self.background!r}")
        if self.size is not None and self.size not in SIZES:
            raise ValueError(f"unknown size {self.size!r}, expected one of {SIZES}")

    @property
    def drawn_background(self) -> str:
        """The named background, or white."""
        return self.background or DEFAULT_BACKGROUND


@dataclass(frozen=True)
class Placed:
    """One object in an image: centre and extent in pixels of a 128 px image."""

    shape: str
    colour: str
    x: float
    y: float
    size: float


def kept_out(spec: Spec) -> bool:
    """Say whether the combination is kept out of training: an unseen pair, or one in eight
    contents.

    The content leaves out what only decorates it: the background counts as content only in the
    families that have too few combinations without it.
    """
    if any((t.shape, t.drawn_colour)[::-1] in UNSEEN_PAIRS for t in spec.things):
        return True
    parts = [f"{t.drawn_colour} {t.shape}" for t in spec.things] + [str(spec.count)]
    if spec.family in ("single", "two"):
        parts += [spec.drawn_background, spec.size or ""]
    parts += [spec.relation or "", spec.family]
    return zlib.crc32("|".join(parts).encode()) % 8 == 0
