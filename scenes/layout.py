"""Where things stand: one canonical place and size per meaning, with a few pixels of jitter.

The jitter keeps images from being identical; it is small against the 32 px patches of the
vision tower, so the mean over it is still an image of the same scene.
"""

from __future__ import annotations

import numpy as np

from scenes.world import COLOURS, SHAPES, UNSEEN_PAIRS, Placed, Spec, Thing

SIDE = 128  # px
NEAR, MID, FAR = 34.0, 64.0, 94.0
MEDIUM, SMALL, LARGE = 54.0, 32.0, 84.0
PAIR_SIZE, CROWD_SIZE = 42.0, 40.0

_COUNT_PLACES: dict[int, tuple[tuple[float, float], ...]] = {
    1: ((MID, MID),),
    2: ((NEAR, MID), (FAR, MID)),
    3: ((MID, NEAR), (NEAR, FAR), (FAR, FAR)),
    4: ((NEAR, NEAR), (FAR, NEAR), (NEAR, FAR), (FAR, FAR)),
}
# Where the first and the second thing stand; without a relation they stand left and right.
_PAIR_PLACES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "left": ((NEAR, MID), (FAR, MID)),
    "right": ((FAR, MID), (NEAR, MID)),
    "above": ((MID, NEAR), (MID, FAR)),
    "below": ((MID, FAR), (MID, NEAR)),
}


def place(spec: Spec, rng: np.random.Generator | None = None) -> tuple[Placed, ...]:
    """Return the objects of `spec`; without `rng` exactly at their canonical places."""
    places: tuple[tuple[float, float], ...]
    things: tuple[Thing, ...]
    if len(spec.things) == 2:
        places = _PAIR_PLACES[spec.relation or "left"]
        things, size = spec.things, PAIR_SIZE
    else:
        places = _COUNT_PLACES[spec.count]
        things = spec.things * spec.count
        size = {None: MEDIUM, "small": SMALL, "large": LARGE}[spec.size]
        size = size if spec.count == 1 else CROWD_SIZE
    if rng is None:
        shift, own, scale = np.zeros(2), np.zeros((len(things), 2)), 1.0
    else:
        shift = rng.uniform(-2, 2, 2)
        own = rng.uniform(-1.5, 1.5, (len(things), 2))
        scale = rng.uniform(0.95, 1.05)
    return tuple(
        Placed(t.shape, t.drawn_colour, x + shift[0] + dx, y + shift[1] + dy, size * scale)
        for t, (x, y), (dx, dy) in zip(things, places, own, strict=True)
    )


def scatter(rng: np.random.Generator, count: int) -> tuple[Placed, ...]:
    """`count` or fewer free objects anywhere without touching: what the tower learns to read."""
    placed: list[Placed] = []
    for _ in range(20 * count):
        if len(placed) == count:
            break
        shape = SHAPES[rng.integers(len(SHAPES))]
        colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
        size = float(rng.uniform(28, 60 if count > 1 else 88))
        x, y = rng.uniform(size / 2 + 3, SIDE - size / 2 - 3, 2)
        clear = all(max(abs(x - p.x), abs(y - p.y)) > (size + p.size) / 2 + 5 for p in placed)
        if clear and (colour, shape) not in UNSEEN_PAIRS:
            placed.append(Placed(shape, colour, float(x), float(y), size))
    return tuple(placed)
