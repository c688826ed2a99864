"""What counts as finite, and what is advised."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bifrost_rt import Generator, NumericsError, request
from bifrost_rt.numerics import Checks, problem


def test_a_problem_names_how_much_and_where() -> None:
    array = np.ones((7, 4), np.float32)
    assert problem(array, "image") is None
    array[2, 1] = np.inf
    assert problem(array, "image") == "are not finite: 1 of 28 values (image 2)"
    array[[0, 3, 4, 6], 0] = np.nan
    assert problem(array, "prompt") == "are not finite: 5 of 28 values (prompts 0, 2, 3, 4 …)"


@pytest.mark.parametrize("largest", [1e15, 65504.0, 3.0])
def test_large_values_that_norms_can_take(largest: float) -> None:
    assert problem(np.array([[-largest, 0.0]], np.float32), "image") is None
    assert np.isfinite(np.sum(np.full(10**6, largest, np.float32) ** 2))


def test_values_whose_squares_overflow() -> None:
    assert problem(np.array([[0, -1e20]], np.float32), "image") == (
        "reach 1e+20, so that norms overflow (image 0)"
    )


def test_float16_is_named_where_it_computes(generator: Generator) -> None:
    facts = generator.manifest
    engines = tuple(
        dataclasses.replace(e, precision=dataclasses.replace(e.precision, compute="float16"))
        for e in facts.engines
    )
    asked = request.check(facts, prompt="a", output_type="np")
    spoiled = np.full((1, 2), np.nan, np.float32)
    half = dataclasses.replace(facts, engines=engines)
    for manifest, replaced, hint in (
        (
            half,
            False,
            "`t5_text` computes in float16, whose largest number is 65504: build .* bf16",
        ),
        (facts, True, "a value that callback_on_step_end returned may be too large"),
        (facts, False, "`bifrost-rt verify DIR` tells"),
    ):
        checks = Checks(manifest, asked, np.asarray, replaced)
        with pytest.raises(NumericsError, match=f"hint: {hint}"):
            checks.finite("t5_text", "prompt_embeds", spoiled, "prompt")


def test_nothing_is_looked_at_inside_a_loop(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As many arrays for one step as for nine."""
    looked: list[str] = []
    original = Checks.finite

    def counted(self: Checks, stage: str, *rest: Any, **more: Any) -> None:
        looked.append(stage)
        original(self, stage, *rest, **more)

    monkeypatch.setattr(Checks, "finite", counted)
    for steps in (1, 9):
        generator.run("a", seed=1, decoding_steps=steps, num_inference_steps=steps)
    assert looked == ["visual_decode", "clip_text", "t5_text", "denoise"] * 2
