"""What an edit keeps of its image: pixels to the bit, and latents in every denoising step."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FluxPipeline
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt import (
    BudgetError,
    Generator,
    RequestError,
    RequestTypeError,
    image_latents,
    image_processor,
    masks,
    pipeline,
    request,
)
from bifrost_rt import manifest as manifests
from bifrost_rt.backends.onnxruntime import OnnxRuntime
from bifrost_rt.engines import Engines
from tests.conftest import ALPHA, difference

FEW: dict[str, Any] = {
    "num_inference_steps": 5,
    "decoding_steps": 2,
    "output_type": "np",
    "seed": 1,
}


def scene(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(0)
    cells = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    return cells.resize((width, height), Image.Resampling.BICUBIC)


def marked(width: int, height: int) -> Image.Image:
    """A few pixels off the middle, on no border of latents or tokens."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2 + 3, height // 2 + 1, width // 2 + 9, height // 2 + 12))
    return mask


IMAGE, MASK = scene(150, 100), marked(150, 100)


def of_the_set(image: Image.Image, facts: Any) -> NDArray[np.uint8]:
    side = facts.model.image_width
    square = image_processor.middle(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(square)


@pytest.fixture(scope="module")
def latents(generator: Generator) -> NDArray[np.float32]:
    """The image's, by diffusers."""
    pixels = of_the_set(IMAGE, generator.manifest)
    vae = AutoencoderKL.from_pretrained(ALPHA / "flux/vae")
    x = torch.tensor(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.inference_mode():
        mode = vae.encode(x).latent_dist.mode()
    z = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    packed: NDArray[np.float32] = FluxPipeline._pack_latents(z, *z.shape).numpy()
    return packed


def test_latents_are_those_of_diffusers(generator: Generator, latents: NDArray[np.float32]) -> None:
    pixels = of_the_set(IMAGE, generator.manifest)
    several = np.stack([pixels, pixels[::-1], pixels])
    found = image_latents.encode(generator._engines, generator.manifest, several, {})
    assert difference(found[[0, 2]], np.repeat(latents, 2, axis=0)) < 1e-4
    assert difference(found[1:2], latents) > 0.1


@pytest.mark.parametrize("interval", [1, 2])
def test_latents_of_the_known_region_follow_the_images_own_path(
    generator: Generator, latents: NDArray[np.float32], interval: int
) -> None:
    """After each step: the image's latents with the run's noise at the level that is reached."""
    seen: list[NDArray[np.float32]] = []

    def watch(_: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> None:
        if "latents" in tensors:
            seen.append(tensors["latents"])

    arguments = {**FEW, "num_inference_steps": 8, "cache_interval": interval}
    found = generator.run("a cow", image=IMAGE, mask=MASK, callback_on_step_end=watch, **arguments)
    checked = request.check(generator.manifest, prompt="a cow", **arguments)
    _, plan = pipeline.denoising(generator.manifest, checked)
    side = round(generator.manifest.model.num_image_tokens**0.5)
    drawn = masks.touched(MASK, side, IMAGE.size).ravel()
    assert 0 < drawn.sum() < drawn.size / 4
    assert len(seen) == 8
    for level, array in zip(plan.reached, seen, strict=True):
        known = (1 - level) * latents + level * checked.latents
        assert difference(array[:, ~drawn], known[:, ~drawn]) < 1e-4
        if level > 0:
            assert difference(array[:, drawn], known[:, drawn]) > 1e-2
    assert np.array_equal(found.latents, seen[-1])


def test_pixels_outside_the_mask_are_the_images(generator: Generator) -> None:
    found = generator.run(["a cow", "a dog"], image=IMAGE, mask=MASK, **FEW)
    image = of_the_set(IMAGE, generator.manifest)
    inside = masks.touched(MASK, len(image), IMAGE.size)
    for drawn in found.images:
        assert np.array_equal(drawn[~inside], image[~inside])
        assert not np.array_equal(drawn[inside], image[inside])
    assert found.parameters["keep_pixels"] is True


def test_an_image_of_the_sets_size_is_not_resampled(generator: Generator) -> None:
    side = generator.manifest.model.image_width
    image, mask = scene(side, side), marked(side, side)
    found = generator.run("a cow", image=image, mask=mask, **FEW)
    outside = np.asarray(mask) == 0
    assert np.array_equal(found.images[0][outside], np.asarray(image)[outside])


def test_a_canvas_keeps_the_image_in_its_middle(generator: Generator) -> None:
    found = generator.run("a cow", image=IMAGE, extend=0.5, **FEW)
    side = generator.manifest.model.image_width
    canvas = masks.canvas(IMAGE, Image.new("L", IMAGE.size), 0.5)[0]
    kept = slice(side // 4, 3 * side // 4)
    expected = of_the_set(canvas, generator.manifest)[kept, kept]
    assert np.array_equal(found.images[0][kept, kept], expected)


def test_what_is_not_kept_is_drawn_from_tokens(generator: Generator) -> None:
    plain = generator.run("a cow", image=IMAGE, mask=MASK, keep_pixels=False, **FEW)
    tokens = generator.run("a cow", tokens=generator.encode(IMAGE), mask=image_mask(), **FEW)
    assert np.array_equal(plain.images, tokens.images)
    assert plain.parameters["keep_pixels"] is False
    kept = generator.run("a cow", image=IMAGE, mask=MASK, **FEW)
    assert np.array_equal(plain.tokens, kept.tokens)
    assert not np.array_equal(plain.images, kept.images)


def image_mask() -> Image.Image:
    """The mask, cut as the image is: beside tokens there is no image to stretch it to."""
    return image_processor.middle(MASK)


def test_edits_are_drawn_together_as_alone(generator: Generator) -> None:
    asked = [
        generator.ask(prompt=prompt, image=image, mask=mask, **FEW)
        for prompt, image, mask in (
            ("a cow", IMAGE, MASK),
            ("a dog", scene(70, 70), marked(70, 70)),
        )
    ]
    together = generator.draw(request.merge(asked)).images
    alone = [generator.draw(one).images for one in asked]
    assert together is not None
    apart = together.astype(int) - np.concatenate(alone).astype(int)
    assert np.abs(apart).max() <= 1


def test_a_preview_shows_the_image_outside_the_mask(generator: Generator) -> None:
    seen: list[NDArray[np.uint8]] = []

    def watch(_: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> None:
        if "preview" in tensors:
            seen.append(tensors["preview"][0])

    found = generator.run(
        "a cow", image=IMAGE, mask=MASK, callback_on_step_end=watch, preview_every=1, **FEW
    )
    inside = masks.touched(MASK, generator.manifest.model.image_width, IMAGE.size)
    assert len(seen) == FEW["num_inference_steps"] - 1
    for preview in seen:
        assert np.array_equal(preview[~inside], found.images[0][~inside])


def test_what_cannot_be_kept_is_an_error(generator: Generator) -> None:
    for arguments in (
        {"prompt": "a cow"},
        {"prompt": "a cow", "image": IMAGE},
        {"prompt": "a cow", "tokens": generator.encode(IMAGE), "mask": MASK},
    ):
        with pytest.raises(RequestError, match="keeps what lies outside the mask of an image"):
            generator.run(**arguments, keep_pixels=True)
    with pytest.raises(RequestTypeError, match="keep_pixels must be true or false, got 'yes'"):
        generator.run("a cow", image=IMAGE, mask=MASK, keep_pixels="yes")  # type: ignore[arg-type]


def test_a_set_without_the_engine_says_so(alpha_set: Path, tmp_path: Path) -> None:
    """Such as one that an earlier version has built."""
    shutil.copytree(alpha_set, tmp_path / "set")
    facts = manifests.read(alpha_set)
    lost = facts.engine(image_latents.NAME)
    engines = tuple(spec for spec in facts.engines if spec is not lost)
    files = {name: file for name, file in facts.files.items() if name not in lost.files}
    older = dataclasses.replace(facts, engines=engines, files=files)
    (tmp_path / "set" / manifests.FILENAME).write_bytes(older.dumps())
    with Generator(tmp_path / "set") as generator:
        found = generator.run("a cow", image=IMAGE, mask=MASK, **FEW)
        assert [note for note in found.warnings if "pixels outside the mask" in note]
        plain = generator.run("a cow", image=IMAGE, mask=MASK, keep_pixels=False, **FEW)
        assert np.array_equal(found.images, plain.images)
        with pytest.raises(RequestError, match="has no engine `vae_encode`"):
            generator.run("a cow", image=IMAGE, mask=MASK, keep_pixels=True, **FEW)


def test_a_budget_that_does_not_hold_the_engine_is_refused(alpha_set: Path) -> None:
    facts = manifests.read(alpha_set)
    engines = Engines(alpha_set, facts, OnnxRuntime(), 40 << 20)
    side = facts.model.image_width
    with pytest.raises(BudgetError, match="engine `vae_encode` needs "):
        image_latents.encode(engines, facts, np.zeros((400, side, side, 3), np.uint8), {})
    engines.close()
