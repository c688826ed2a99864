"""The scorer is measured before anything is measured with it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage

from scenes.layout import place
from scenes.render import render
from scenes.sampling import any_spec
from scenes.scorer import judge, read
from scenes.world import BACKGROUNDS, COLOURS, FAMILIES, RELATIONS, Spec, Thing


def _specs(count: int, seed: int) -> list[Spec]:
    rng = np.random.default_rng(seed)
    return [any_spec(rng, FAMILIES[i % len(FAMILIES)]) for i in range(count)]


def test_ground_truth_renders_pass() -> None:
    rng = np.random.default_rng(1)
    wrong = [
        (spec, verdict.reason)
        for spec in _specs(600, seed=2)
        if not (verdict := judge(spec, render(place(spec, rng), spec.drawn_background))).correct
    ]
    assert len(wrong) <= 3, wrong


def test_soft_and_noisy_renders_pass() -> None:
    """An image that went through an autoencoder is a little soft and a little uneven."""
    rng = np.random.default_rng(3)
    wrong = []
    for spec in _specs(200, seed=4):
        image = render(place(spec, rng), spec.drawn_background).astype(np.float32)
        image = ndimage.gaussian_filter(image, (0.7, 0.7, 0)) + rng.normal(0, 6, image.shape)
        verdict = judge(spec, image.clip(0, 255).astype(np.uint8))
        if not verdict.correct:
            wrong.append((spec, verdict.reason))
    assert len(wrong) <= 1, wrong


def _contradicts(asked: Spec, shown: Spec) -> bool:
    """Whether an image of `shown` cannot also be one of `asked`."""
    if asked.background and asked.background != shown.drawn_background:
        return True
    wanted = sorted(t.shape for t in asked.things * asked.count)
    return wanted != sorted(t.shape for t in shown.things * shown.count)


def test_swapped_captions_fail() -> None:
    specs = _specs(400, seed=5)
    pairs = [(a, b) for a, b in itertools.pairwise(specs) if _contradicts(a, b)]
    assert len(pairs) > 200
    assert not any(
        judge(asked, render(place(shown), shown.drawn_background)).correct for asked, shown in pairs
    )


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_other_relation_fails(relation: str) -> None:
    things = (Thing("circle", "red"), Thing("square", "blue"))
    image = render(place(Spec("position", things, relation=relation)), "white")
    right = [r for r in RELATIONS if judge(Spec("position", things, relation=r), image).correct]
    assert right == [relation]


def test_swapped_colours_wrong_counts_and_sizes_fail() -> None:
    pair = Spec("attribution", (Thing("circle", "red"), Thing("cross", "green")))
    swapped = (Thing("circle", "green"), Thing("cross", "red"))
    assert not judge(replace(pair, things=swapped), render(place(pair), "white")).correct
    three = Spec("counting", (Thing("triangle", "pink"),), count=3)
    for count in (1, 2, 4):
        assert not judge(replace(three, count=count), render(place(three), "white")).correct
    small = Spec("colours", (Thing("square", "red"),), size="small")
    for other in (None, "large"):
        assert not judge(small, render(place(replace(small, size=other)), "white")).correct


def test_a_rounded_square_is_not_a_square() -> None:
    image = np.full((128, 128, 3), 255, np.uint8)
    rows, columns = np.mgrid[:128, :128] - 64
    inside = (np.abs(rows) / 24.0) ** 3 + (np.abs(columns) / 24.0) ** 3 <= 1
    image[inside] = COLOURS["blue"]
    assert not judge(Spec("single", (Thing("square"),)), image).correct


def test_noise_and_empty_images_hold_nothing() -> None:
    rng = np.random.default_rng(6)
    noise = rng.integers(0, 256, (128, 128, 3)).astype(np.uint8)
    for spec in _specs(12, seed=7):
        assert not judge(spec, noise).correct
        for colour in BACKGROUNDS.values():
            empty = np.broadcast_to(np.uint8(colour), (128, 128, 3))
            assert read(empty).objects == ()
            assert not judge(spec, empty).correct
