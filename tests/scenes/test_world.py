"""Captions determine scenes, and the held-out list stays what it was."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from scenes.captions import caption, describe
from scenes.heldout import PER_FAMILY, heldout, heldout_prompts
from scenes.layout import SIDE, place, scatter
from scenes.sampling import any_spec, training_spec, without_layout
from scenes.world import FAMILIES, UNSEEN_PAIRS, Spec, Thing, kept_out


def test_the_heldout_list_is_pinned() -> None:
    lines = "\n".join(f"{i.seed} {i.kept_out} {i.prompt} {i.spec!r}" for i in heldout())
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "dd82c4d0db6c4aff"


def test_the_heldout_list_has_fifty_different_prompts_per_family() -> None:
    for family in FAMILIES:
        prompts = [i.prompt for i in heldout() if i.spec.family == family]
        assert len(prompts) == len(set(prompts)) == PER_FAMILY
    assert sum(item.kept_out for item in heldout()) == 120


def test_training_never_sees_what_is_kept_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        spec = training_spec(rng)
        assert not kept_out(spec)
        shown = {(o.colour, o.shape) for o in (*place(spec, rng), *scatter(rng, 4))}
        assert not shown & UNSEEN_PAIRS


def test_a_caption_says_everything_that_varies() -> None:
    """Two meanings with one wording would teach the visual branch the mean of two scenes."""
    rng = np.random.default_rng(1)
    scenes: dict[str, str] = {}
    for i in range(3000):
        spec = any_spec(rng, FAMILIES[i % 6])
        shown = describe(place(spec), spec.drawn_background)
        assert scenes.setdefault(caption(spec, rng), shown) == shown


def test_captions_without_layout_keep_the_things() -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        spec = training_spec(rng)
        other = without_layout(spec, rng)
        assert set(other.things) == set(spec.things)
        assert other.background == spec.background
    counts = {
        without_layout(Spec("counting", (Thing("circle"),), count=2), rng).count for _ in range(99)
    }
    assert counts == {1, 2, 3, 4}


def test_objects_stay_inside_the_image_and_apart() -> None:
    rng = np.random.default_rng(3)
    for i in range(300):
        objects = place(any_spec(rng, FAMILIES[i % 6]), rng)
        for a in objects:
            assert a.size / 2 < a.x < SIDE - a.size / 2
            assert a.size / 2 < a.y < SIDE - a.size / 2
            for b in objects:
                assert a is b or max(abs(a.x - b.x), abs(a.y - b.y)) > (a.size + b.size) / 2


def test_heldout_prompts_read_as_english() -> None:
    assert "a drawing of a small square" in heldout_prompts()
    assert not any("  " in p or "a orange" in p for p in heldout_prompts())


def test_impossible_meanings_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape"):
        Thing("hexagon")
    with pytest.raises(ValueError, match="needs two things"):
        Spec("position", (Thing("circle"),), relation="left")
