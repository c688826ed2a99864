"""Random meanings: the training distribution, without what is kept out of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from scenes.world import (
    BACKGROUNDS,
    COLOURS,
    FAMILIES,
    RELATIONS,
    SHAPES,
    SIZES,
    Spec,
    Thing,
    kept_out,
)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def any_spec(rng: np.random.Generator, family: str) -> Spec:
    """Return a random meaning of one family, kept out of training or not."""
    background = _pick(rng, tuple(BACKGROUNDS)) if rng.random() < 0.5 else None
    size = _pick(rng, SIZES) if rng.random() < 0.4 else None
    colour = _pick(rng, tuple(COLOURS))
    shape = _pick(rng, SHAPES)
    if family == "single":
        return Spec(family, (Thing(shape),), background=background, size=size)
    if family == "colours":
        return Spec(family, (Thing(shape, colour),), background=background, size=size)
    if family == "counting":
        named = colour if rng.random() < 0.6 else None
        count = int(rng.integers(1, 5))
        return Spec(family, (Thing(shape, named),), count=count, background=background)
    coloured = family == "attribution" or (family == "position" and rng.random() < 0.6)
    relation = _pick(rng, RELATIONS) if family == "position" else None
    while True:
        other = Thing(_pick(rng, SHAPES), _pick(rng, tuple(COLOURS)) if coloured else None)
        first = Thing(shape, colour if coloured else None)
        alike = first.shape == other.shape or first.drawn_colour == other.drawn_colour
        # Two things of one shape are told apart by colour, and only where colours are the point.
        if not alike or (family == "attribution" and first.colour != other.colour):
            return Spec(family, (first, other), relation=relation, background=background)


def training_spec(rng: np.random.Generator) -> Spec:
    """Return a random meaning that training may see."""
    # Scenes of two things have by far the most combinations, so they come up most often.
    family = FAMILIES[rng.choice(len(FAMILIES), p=(0.08, 0.14, 0.2, 0.14, 0.24, 0.2))]
    while True:
        spec = any_spec(rng, family)
        if not kept_out(spec):
            return spec


def without_layout(spec: Spec, rng: np.random.Generator) -> Spec:
    """Return the same things with counts and relations drawn anew.

    The diffusion model's own text sees this meaning: layout words occur in it and say nothing, so
    places and counts must come through the latents.
    """
    if spec.family == "counting":
        return replace(spec, count=int(rng.integers(1, 5)))
    if len(spec.things) == 2:
        things = spec.things if rng.random() < 0.5 else spec.things[::-1]
        relation = None if rng.random() < 0.3 else _pick(rng, RELATIONS)
        return replace(spec, relation=relation, things=things)
    return spec
