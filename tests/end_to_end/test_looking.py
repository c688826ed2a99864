"""Looking at an image with a set: within its memory budget, and never in the way of drawing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import BudgetError, Generator, RequestError, image_processor, vision
from bifrost_rt import manifest as manifests
from bifrost_rt.backends.onnxruntime import OnnxRuntime
from bifrost_rt.engines import Engines


def seen(engines: Engines, facts: Any, width: int = 90, height: int = 60) -> Any:
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    assert facts.vision is not None
    return vision.encode(engines, facts, image_processor.patches(image, facts.vision), {})


def test_drawing_does_not_open_what_looks(alpha_set: Path) -> None:
    with Generator(alpha_set) as generator:
        assert vision.NAME not in generator._engines.resident
        generator.run("a cow", num_inference_steps=1, decoding_steps=2)
        assert vision.NAME not in generator._engines.resident
        found = seen(generator._engines, generator.manifest)
        assert vision.NAME in generator._engines.resident
        assert not generator.reloads()
        assert found.shape == (2 * 3, generator.manifest.model.hidden_size)


def test_tokens_do_not_depend_on_the_budget(alpha_set: Path) -> None:
    facts = manifests.read(alpha_set)
    found = []
    for budget in (None, 40 << 20):
        engines = Engines(alpha_set, facts, OnnxRuntime(), budget)
        found.append(seen(engines, facts))
        engines.close()
    assert np.array_equal(*found)
    assert np.isfinite(found[0]).all()


def test_an_image_that_memory_does_not_hold_is_refused_before_it_is_looked_at(
    alpha_set: Path,
) -> None:
    facts = manifests.read(alpha_set)
    engines = Engines(alpha_set, facts, OnnxRuntime(), 40 << 20)
    with pytest.raises(BudgetError, match="stage `vision_encode` needs "):
        seen(engines, facts, 1000, 1000)
    assert len(seen(engines, facts)) == 6
    engines.close()


def test_a_set_without_a_tower_says_so(alpha_set: Path) -> None:
    facts = dataclasses.replace(manifests.read(alpha_set), vision=None)
    engines = Engines(alpha_set, facts, OnnxRuntime())
    with pytest.raises(RequestError, match="reads no images: it was built from an MLLM without"):
        vision.facts(facts)
    engines.close()
