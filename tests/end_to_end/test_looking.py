"""Looking at an image with a set: within its memory budget, and never in the way of drawing."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bifrost_rt import (
    BudgetError,
    Generator,
    RequestError,
    RequestTypeError,
    image_processor,
    vision,
)
from bifrost_rt import manifest as manifests
from bifrost_rt.backends.onnxruntime import OnnxRuntime
from bifrost_rt.engines import Engines
from tests.conftest import ALPHA


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
    with pytest.raises(BudgetError, match="engine `vision_encode` needs "):
        seen(engines, facts, 1000, 1000)
    assert len(seen(engines, facts)) == 6
    engines.close()


def test_a_set_without_a_tower_says_so(alpha_set: Path) -> None:
    facts = dataclasses.replace(manifests.read(alpha_set), vision=None)
    engines = Engines(alpha_set, facts, OnnxRuntime())
    with pytest.raises(RequestError, match="reads no images: it was built from an MLLM without"):
        vision.facts(facts)
    engines.close()


def test_encoded_images_are_the_towers_tokens_on_the_models_grid(
    alpha_set: Path, generator: Generator
) -> None:
    """As the training took them: the whole square, row by row, through transformers."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    facts = generator.manifest
    assert facts.vision is not None
    side = math.isqrt(facts.model.num_visual_tokens)
    pixels = side * facts.vision.patch_size * facts.vision.merge_size
    wide = Image.linear_gradient("L").resize((3 * pixels, pixels)).convert("RGB")
    middle = wide.crop((pixels, 0, 2 * pixels, pixels))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(ALPHA / "mllm", dtype=torch.float32)
    size = {"shortest_edge": pixels**2, "longest_edge": pixels**2}
    given = Qwen2VLImageProcessorPil(size=size)(images=middle, return_tensors="pt")
    with torch.inference_mode():
        found = model.model.visual(given["pixel_values"], given["image_grid_thw"])
    expected = found.pooler_output.numpy()
    tokens = generator.encode(wide)
    assert tokens.shape == (1, side**2, facts.model.hidden_size)
    assert np.abs(tokens[0] - expected).max() <= 1e-4 * np.abs(expected).max()


FEW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np", "seed": 1}


def test_an_image_is_drawn_again_from_its_tokens(generator: Generator) -> None:
    image = Image.radial_gradient("L").convert("RGB")
    tokens = generator.encode(image)
    once = generator.run("a cow", image=image, **FEW)
    assert np.array_equal(once.images, generator.run("a cow", tokens=tokens, **FEW).images)
    assert "visual_decode" not in once.timings
    assert set(once.parameters["injected"]) == {"image"}
    two = generator.run(["a cow", "a dog"], image=image, num_images_per_prompt=2, **FEW)
    assert np.array_equal(two.tokens, np.repeat(tokens, 4, axis=0))
    said = generator.describe(image).text
    own = generator.run(image=image, **FEW)
    assert own.parameters["prompt"] == said


def test_what_an_image_cannot_be_drawn_from_is_named(generator: Generator) -> None:
    with pytest.raises(RequestError, match=r"run\(\) needs a prompt or an image"):
        generator.run(**FEW)
    with pytest.raises(RequestError, match="image and tokens are two sources of CLIP latents"):
        image = Image.new("RGB", (9, 9))
        generator.run("a", image=image, tokens=np.zeros((1, 16, 64), np.float32), **FEW)
    with pytest.raises(RequestError, match="image is no image that Pillow reads"):
        generator.encode(b"no image")


def test_other_arguments_are_refused_before_an_image_is_looked_at(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("encode", "describe"):
        monkeypatch.setattr(generator, name, None)  # would fail in another way
    image = Image.new("RGB", (9, 9))
    with pytest.raises(RequestTypeError, match="num_images_per_prompt must be a whole number"):
        generator.run("a", image=image, num_images_per_prompt="2")  # type: ignore[arg-type]
    with pytest.raises(RequestTypeError, match="prompt must be a text or a list of texts, got int"):
        generator.run(5, image=image)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="num_inference_steps must be at least 1"):
        generator.run(image=image, num_inference_steps=0)
