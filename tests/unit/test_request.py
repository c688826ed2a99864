"""Requests that cannot be served get one clear error, before anything runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from bifrost_rt import RequestError, RequestTypeError, request, schedules
from bifrost_rt.manifest import (
    Defaults,
    EncoderText,
    Manifest,
    MllmText,
    ModelFacts,
    Range,
    Scheduler,
    Text,
)

FACTS = Manifest(
    format=1,
    name="alpha",
    backend="onnxruntime",
    builder={},
    model=ModelFacts(64, 16, 64, 16, 128, 128, True),
    scheduler=Scheduler(1000, True, 3.0, 0.5, 1.15, 256, 4096),
    defaults=Defaults(16, 1.0, 28, 3.5, 0.7),
    text=Text(MllmText("", (), "", (), 48), EncoderText("", 77, 0), EncoderText("", 32, 0)),
    dimensions={},
    engines=(),
    files={},
)


def check(**changes: Any) -> request.Request:
    return request.check(FACTS, **{"prompt": "a", **changes})


def test_defaults_are_the_sets() -> None:
    found = check().parameters
    assert found.num_inference_steps == 28
    assert found.decoding_steps == 16
    assert (found.guidance_scale, found.controlnet_conditioning_scale) == (3.5, 0.7)
    assert found.cfg_weight == 1.0


def test_images_come_prompt_by_prompt() -> None:
    checked = check(prompt=["a", "b", "a"], num_images_per_prompt=2)
    assert checked.prompts == ("a", "b")
    assert checked.prompt_index.tolist() == [0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize("prompt", [None, 3, b"a", {"a": 1}, ["a", None], [["a"]], [b"a"]])
def test_a_prompt_that_is_not_text(prompt: Any) -> None:
    with pytest.raises(RequestTypeError, match="prompt"):
        check(prompt=prompt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "empty list"),
        ({"prompt": "a\ud800"}, "not valid Unicode"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"decoding_steps": 0}, "decoding_steps must be at least 1, got 0"),
        ({"cache_interval": 0}, "cache_interval must be at least 1, got 0"),
        ({"decoding_steps": -3}, "decoding_steps must be at least 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"num_inference_steps": True}, "whole number"),
        ({"num_inference_steps": "4"}, "whole number"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"cfg_weight": float("nan")}, "cfg_weight must be finite"),
        ({"cfg_weight": 1e39}, "cfg_weight must be finite in float32"),
        ({"guidance_scale": "3"}, "guidance_scale must be a number"),
        ({"height": 512}, "built for 128x128"),
        ({"width": 64}, "built for 128x128"),
        ({"output_type": "jpg"}, "output_type must be"),
        ({"order": np.zeros((1, 16))}, "order must hold whole numbers"),
        ({"order": np.zeros((1, 16), int)}, "permutation of 0..15"),
        ({"order": np.arange(16)}, r"order must have the shape \[1, 16\], got \[16\]"),
        ({"latents": np.zeros((1, 64, 16), int)}, "floating point"),
        ({"latents": np.zeros((1, 256, 16))}, r"shape \[1, 64, 16\].*got \[1, 256, 16\]"),
        ({"latents": np.full((1, 64, 16), np.inf)}, "not finite"),
    ],
)
def test_what_cannot_be_served_is_named(changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_images_per_prompt": 100_000}, "num_images_per_prompt=100000: one run draws at most"),
        ({"num_images_per_prompt": 10**15}, "one run draws at most 4096"),
        ({"prompt": ["a"] * 100_000}, "prompt has 100000 texts, for 100000 images: one run"),
        (
            {"prompt": ["a", "b"], "num_images_per_prompt": 5000},
            "2 prompts with num_images_per_prompt=5000 are 10000 images: one run",
        ),
        ({"num_inference_steps": 10**9}, "num_inference_steps must be at most 10000"),
        ({"decoding_steps": 10**9}, "decoding_steps must be at most 10000"),
    ],
)
def test_numbers_beyond_all_reason_are_refused_at_once(changes: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check(**changes)


def test_more_images_than_the_set_was_built_for() -> None:
    facts = dataclasses.replace(FACTS, dimensions={"images": Range(1, 4)})
    assert request.check(facts, prompt=["a", "b"], num_images_per_prompt=2).images == 4
    with pytest.raises(RequestError, match="the set 'alpha' was built for at most 4 in one run"):
        request.check(facts, prompt="a", num_images_per_prompt=5)
    with pytest.raises(RequestError, match="at most 4 in one run") as refused:
        request.check(facts, prompt="a", num_images_per_prompt=100_000)
    assert refused.value.hint == "draw fewer at a time"


def test_order_and_noise_are_drawn_when_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So a run that is refused has drawn none; they are those of the seed all the same."""
    expected = schedules.random_latents(3, 2, (64, 16)), schedules.random_orders(3, 2, 16)
    with monkeypatch.context() as patched:
        patched.setattr(schedules, "random_latents", None)
        patched.setattr(schedules, "random_orders", None)
        checked = check(seed=3, num_images_per_prompt=2)
        assert checked.images == 2
    assert np.array_equal(checked.latents, expected[0])
    assert np.array_equal(checked.order, expected[1])
    assert checked.latents is checked.latents


def test_arrays_of_other_widths_are_taken() -> None:
    checked = check(
        order=np.arange(16, dtype=np.int32)[None], latents=np.zeros((1, 64, 16), np.float64)
    )
    assert (checked.order.dtype, checked.latents.dtype) == (np.int64, np.float32)


def test_merged_images_keep_their_prompts_orders_and_noise() -> None:
    parts = [
        check(prompt="a", seed=1, num_images_per_prompt=2),
        check(prompt="b", seed=2),
        check(prompt="a", seed=3),
    ]
    merged = request.merge(parts)
    assert merged.prompts == ("a", "b")
    assert merged.prompt_index.tolist() == [0, 0, 1, 0]
    for name in ("order", "latents"):
        alone = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(getattr(merged, name), alone)
    assert request.merge(parts[:1]) is parts[0]
    assert check(num_inference_steps=3).settings != check().settings
