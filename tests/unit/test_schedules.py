"""Schedules against the reference's recorded values."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import pytest

from bifrost_rt import schedules
from bifrost_rt.manifest import Scheduler
from tests.conftest import ALPHA

FLUX = Scheduler(1000, True, 3.0, 0.5, 1.15, 256, 4096)
SIGMA_CASES = json.loads((ALPHA / "scheduler_cases.json").read_text())
REVEALED = json.loads((ALPHA / "verify.json").read_text())["e_histograms"]


@pytest.mark.parametrize("case", SIGMA_CASES, ids=lambda c: f"{c['image_seq_len']}-{c['steps']}")
def test_sigmas_are_the_references_to_the_bit(case: dict) -> None:
    found = schedules.sigmas(case["steps"], case["image_seq_len"], FLUX)
    assert np.array_equal(found, np.array(case["sigmas"], np.float32))
    assert np.array_equal(found[:-1] * np.float32(1000), np.array(case["timesteps"], np.float32))


def test_all_36_sigma_schedules_are_covered() -> None:
    assert len(SIGMA_CASES) == 36


def test_static_shift_as_flux_schnell_has_it() -> None:
    static = Scheduler(1000, False, 1.0, 0.5, 1.15, 256, 4096)
    np.testing.assert_allclose(schedules.sigmas(4, 4096, static), [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(("tokens", "steps", "active"), [(16, 4, 4), (16, 16, 16), (16, 40, 16)])
def test_steps_that_reveal_nothing_are_not_counted(tokens: int, steps: int, active: int) -> None:
    masks = schedules.reveal_masks(np.arange(tokens)[None], steps)
    assert sum(bool(mask.any()) for mask in masks) == active
    assert schedules.active_steps(tokens, steps) == active


@pytest.mark.parametrize("name", REVEALED)
def test_reveal_counts_are_the_references(name: str) -> None:
    tokens, _, steps, _ = name.split("_")
    kept = [int(tokens), *schedules.kept_counts(int(tokens), int(steps))]
    counts = [a - b for a, b in pairwise(kept)]
    sequence = REVEALED[name]["sequence"]
    assert counts == ([1] * int(steps) if sequence == "all ones" else sequence)


def test_256_tokens_in_8_steps() -> None:
    order = np.random.default_rng(0).permutation(256)[None]
    masks = schedules.reveal_masks(order, 8)
    assert masks.sum(axis=(1, 2)).tolist() == [5, 15, 24, 31, 39, 45, 48, 49]


@pytest.mark.parametrize(("tokens", "steps"), [(16, 1), (16, 16), (16, 40), (36, 7), (1, 3)])
def test_every_place_is_revealed_exactly_once(tokens: int, steps: int) -> None:
    order = np.stack([np.random.default_rng(i).permutation(tokens) for i in range(3)])
    masks = schedules.reveal_masks(order, steps)
    assert masks.shape == (steps, 3, tokens)
    assert (masks.sum(axis=0) == 1).all()


def test_the_end_of_the_order_is_revealed_first() -> None:
    masks = schedules.reveal_masks(np.array([[2, 0, 3, 1]]), 4)
    assert [int(mask.argmax()) for mask in masks[:, 0]] == [1, 3, 0, 2]


@pytest.mark.parametrize(("tokens", "steps"), [(16, 1), (16, 5), (16, 16), (36, 7)])
def test_rows_take_each_token_from_where_it_is(tokens: int, steps: int) -> None:
    order = np.stack([np.random.default_rng(i).permutation(tokens) for i in range(3)])
    masks = schedules.reveal_masks(order, steps)
    places, sources = schedules.reveal_rows(masks)
    assert places.shape == (steps, 3, schedules.most_revealed(tokens, steps))
    for mask, place, source in zip(masks, places, sources, strict=True):
        before = np.arange(3 * tokens).reshape(3, tokens)
        predicted = 1000 + np.take_along_axis(before, place, axis=1)
        after = np.concatenate([before.ravel(), predicted.ravel()])[source]
        assert np.array_equal(after, np.where(mask, 1000 + before, before))


def velocities(steps: int) -> list[float]:
    """Of some smooth path, on the noise levels of a run."""
    levels = schedules.sigmas(steps, 1024, FLUX)
    return [math.sin(3 * float(level)) + float(level) ** 2 for level in levels]


def test_an_interval_of_1_is_eulers_method() -> None:
    levels = schedules.sigmas(28, 1024, FLUX)
    plan = schedules.denoising_plan(levels, 1)
    assert plan.computed == (True,) * 28
    assert np.array_equal(plan.weights[:, 0], levels[1:] - levels[:-1])
    assert not plan.weights[:, 1].any()
    assert np.array_equal(plan.reached, levels[1:])


@pytest.mark.parametrize(("steps", "interval"), [(28, 2), (28, 3), (28, 9), (5, 4), (2, 3), (1, 2)])
def test_steps_between_are_eulers_with_a_velocity_on_a_line(steps: int, interval: int) -> None:
    """Against the plain way: every step taken, its velocity computed or read off the line."""
    levels = schedules.sigmas(steps, 1024, FLUX)
    plan = schedules.denoising_plan(levels, interval)
    v, sigma = velocities(steps), levels.astype(np.float64)
    x, at = 0.0, [0]
    for i in range(steps):
        if plan.computed[i]:
            at = [*at[-1:], i]
            found = v[i]
        else:
            a, b = at
            found = v[b] + (v[b] - v[a]) * (sigma[i] - sigma[b]) / (sigma[b] - sigma[a])
        x += (sigma[i + 1] - sigma[i]) * found
    done = [i for i in range(steps) if plan.computed[i]]
    before = [0.0, *(v[i] for i in done)]
    moves = [w @ (v[i], p) for w, i, p in zip(plan.weights, done, before, strict=False)]
    assert sum(moves) == pytest.approx(x, abs=1e-6)
    assert plan.reached[-1] == 0
    assert done[:3] == list(range(min(3, steps)))
    assert set(np.diff(done[2:])) <= {interval}


def test_randomness_of_an_image_depends_on_seed_and_index_alone() -> None:
    assert np.array_equal(schedules.random_orders(3, 5, 36)[:2], schedules.random_orders(3, 2, 36))
    few, many = (schedules.random_latents(3, n, (4, 8)) for n in (1, 4))
    assert np.array_equal(many[:1], few)
    assert len({row.tobytes() for row in many}) == 4


def test_random_streams_are_pinned() -> None:
    """A seed must give the same image in every version of this package."""
    assert schedules.random_orders(42, 1, 8).tolist() == [[1, 3, 5, 7, 4, 6, 0, 2]]
    np.testing.assert_allclose(
        schedules.random_latents(42, 1, (1, 3)), [[[0.90162653, 0.39685556, -0.6641964]]], atol=1e-6
    )
