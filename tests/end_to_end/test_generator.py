"""What users rely on beyond parity: seeds, batches, callbacks, output types, timings."""

from __future__ import annotations

import gc
import itertools
import random
import tracemalloc
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
    dims,
    latents_file,
    memory_plan,
)
from bifrost_rt.backends.choice import choose

FEW = {"num_inference_steps": 2, "decoding_steps": 4}


def run(generator: Generator, prompt: Any = "a red circle", **changes: Any) -> Any:
    return generator.run(prompt, **{"seed": 5, **FEW, **changes})


def test_the_same_seed_gives_the_same_bits(generator: Generator) -> None:
    first, second = run(generator, output_type="np"), run(generator, output_type="np")
    assert first.seed == second.seed == 5
    assert np.array_equal(first.images, second.images)
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.latents, second.latents)


def test_another_seed_gives_another_image(generator: Generator) -> None:
    assert not np.array_equal(run(generator).latents, run(generator, seed=6).latents)


def test_a_drawn_seed_repeats_the_image(generator: Generator) -> None:
    drawn = run(generator, seed=None)
    assert np.array_equal(run(generator, seed=drawn.seed).latents, drawn.latents)


def test_an_image_does_not_depend_on_its_batch(generator: Generator) -> None:
    """Same noise and order; arithmetic may round differently in another batch size."""
    alone = run(generator)
    together = run(generator, num_images_per_prompt=3)
    assert together.latents.shape[0] == 3
    np.testing.assert_allclose(together.latents[0], alone.latents[0], atol=1e-4)


def test_prompts_of_different_lengths_in_one_batch(generator: Generator) -> None:
    prompts = ["a cow", "a photo of four purple suitcases below a tiny white refrigerator", ""]
    for cfg_weight in (1.0, 3.0):
        seeds = run(generator, prompts, cfg_weight=cfg_weight)
        for i, prompt in enumerate(prompts):
            alone = run(
                generator,
                prompt,
                cfg_weight=cfg_weight,
                order=_orders(generator, 5, 3)[i : i + 1],
                latents=_noise(generator, 5, 3)[i : i + 1],
            )
            np.testing.assert_allclose(seeds.tokens[i], alone.tokens[0], atol=1e-4)
            np.testing.assert_allclose(seeds.latents[i], alone.latents[0], atol=1e-4)


def _orders(generator: Generator, seed: int, n: int) -> np.ndarray:
    from bifrost_rt.schedules import random_orders

    return random_orders(seed, n, generator.manifest.model.num_visual_tokens)


def _noise(generator: Generator, seed: int, n: int) -> np.ndarray:
    from bifrost_rt.schedules import random_latents

    model = generator.manifest.model
    return random_latents(seed, n, (model.num_image_tokens, model.latent_channels))


def test_repeated_prompts_are_images_of_their_own(generator: Generator) -> None:
    result = run(generator, ["a cow", "a cow"], num_images_per_prompt=2)
    assert len(result.images) == 4
    assert len({image.tobytes() for image in result.images}) == 4


@pytest.mark.parametrize("decoding_steps", [1, 2, 15, 16, 17, 40])
def test_any_number_of_decoding_steps(generator: Generator, decoding_steps: int) -> None:
    calls = []
    run(
        generator,
        decoding_steps=decoding_steps,
        callback_on_step_end=lambda g, step, t, tensors: calls.append(next(iter(tensors))),
    )
    assert calls == ["tokens"] * decoding_steps + ["latents"] * 2


def test_cached_steps_are_extrapolated(generator: Generator) -> None:
    """An interval changes nothing before the first step that it skips; then the image stays
    close, and every step still calls back."""
    steps = {"num_inference_steps": 12, "output_type": "np"}
    seen = []

    def keep(_: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> None:
        if timestep is not None:
            seen.append(tensors["latents"])

    exact = run(generator, **steps, callback_on_step_end=keep)
    every, seen = seen, []
    cached = run(generator, **steps, cache_interval=3, callback_on_step_end=keep)
    assert cached.parameters["cache_interval"] == 3
    assert len(seen) == len(every) == 12
    # 0, 1, 2, 5, 8 and 11 are computed, and the latents of 2 are those that 5 starts from
    moved = [i for i in range(1, 12) if not np.array_equal(seen[i], seen[i - 1])]
    assert moved == [1, 2, 5, 8, 11]
    assert all(np.array_equal(a, b) for a, b in zip(seen[:2], every[:2], strict=True))
    assert not np.array_equal(cached.latents, exact.latents)
    difference = np.abs(cached.latents - exact.latents)
    assert difference.max() < 0.1 * np.abs(exact.latents).max()
    two = {**steps, "num_inference_steps": 3}
    assert np.array_equal(
        run(generator, **two, cache_interval=2).images, run(generator, **two).images
    )


def test_a_generator_says_what_it_took(alpha_set: Path) -> None:
    with Generator(alpha_set) as generator:
        assert generator.backend == choose(generator.manifest)
    with Generator(alpha_set, backend="onnxruntime") as generator:
        assert generator.backend.reason == "it was asked for"


def test_output_types(generator: Generator) -> None:
    assert isinstance(run(generator).image, Image.Image)
    pixels = run(generator, output_type="np").images
    assert (pixels.dtype, pixels.shape) == (np.uint8, (1, 128, 128, 3))
    latent = run(generator, output_type="latent")
    assert np.array_equal(latent.images, latent.latents)
    assert "vae_decode" not in latent.timings


def test_timings_name_every_engine(generator: Generator) -> None:
    timings = run(generator, "a prompt that nobody has drawn").timings
    engines = set(dims.drawing(generator.manifest.engines))
    assert timings.keys() == engines | {"total"}
    assert all(seconds > 0 for seconds in timings.values())
    assert sum(timings[name] for name in engines) <= timings["total"]


def test_cfg_1_does_not_compute_the_unconditional_half(generator: Generator) -> None:
    """Guidance whose two halves are the same text changes nothing, and cfg 1 never asks for it."""
    plain, guided = run(generator, ""), run(generator, "", cfg_weight=3.0)
    np.testing.assert_allclose(plain.tokens, guided.tokens, atol=1e-5)
    rows = []
    original = generator._engines.run

    def watch(name: str, inputs: dict[str, Any], timings: dict[str, float]) -> Any:
        if name == "mllm_text":
            rows.append(len(inputs["input_ids"]))
        return original(name, inputs, timings)

    generator._engines.run = watch
    try:
        run(generator, "another that nobody has drawn")
        run(generator, "another that nobody has drawn", cfg_weight=3.0)
    finally:
        del generator._engines.run
    assert rows == [1, 2]


def test_a_callback_can_replace_what_the_loop_carries(generator: Generator) -> None:
    def zero(g: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> Any:
        return {"tokens": np.zeros_like(tensors["tokens"])} if "tokens" in tensors else None

    assert not run(generator, callback_on_step_end=zero).tokens.any()


def test_a_callback_that_raises_leaves_the_generator_usable(generator: Generator) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    expected = run(generator).latents
    with pytest.raises(KeyboardInterrupt):
        run(generator, callback_on_step_end=stop)
    assert np.array_equal(run(generator).latents, expected)


def test_fifty_cancels_leave_nothing_behind(generator: Generator) -> None:
    """At any step of both loops: the same image afterwards, and every buffer is free."""
    rng = random.Random(0)
    expected = run(generator).latents
    memory = []
    tracemalloc.start()
    for i in range(51):
        last = rng.randrange(FEW["decoding_steps"] + FEW["num_inference_steps"])
        calls = itertools.count()

        def stop(*_: Any, last: int = last, calls: Any = calls) -> None:
            if next(calls) == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(generator, callback_on_step_end=stop)
        if i % 25 == 0:
            gc.collect()
            of_numpy = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
            buffers = tracemalloc.take_snapshot().filter_traces([of_numpy])
            memory.append(sum(trace.size for trace in buffers.traces))
    tracemalloc.stop()
    # one run's text keys and values alone are more
    assert memory[2] - memory[1] < 1_000
    assert np.array_equal(run(generator).latents, expected)


def test_previews_approach_the_image(generator: Generator) -> None:
    seen = {}

    def look(g: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> None:
        if "preview" in tensors:
            seen[step] = tensors["preview"]

    result = run(
        generator,
        num_inference_steps=8,
        preview_every=2,
        callback_on_step_end=look,
        output_type="np",
    )
    assert list(seen) == [1, 3, 5]  # the last one would be the image itself
    assert result.timings["preview"] > 0
    image = result.images.astype(int)
    assert all(preview.shape == image.shape for preview in seen.values())
    errors = [float(np.abs(preview - image).mean()) for preview in seen.values()]
    assert errors == sorted(errors, reverse=True)
    plain = run(generator, num_inference_steps=8, output_type="np")
    assert np.array_equal(plain.images, result.images)


def test_previews_that_nobody_sees_or_that_do_not_fit(generator: Generator) -> None:
    with pytest.raises(RequestError, match="without callback_on_step_end"):
        run(generator, preview_every=1)
    for wrong, error in ((0, RequestError), (1.5, RequestTypeError), (True, RequestTypeError)):
        with pytest.raises(error, match="preview_every"):
            run(generator, preview_every=wrong, callback_on_step_end=lambda *_: None)


def test_previews_need_engines_that_stay(generator: Generator) -> None:
    largest = max(
        memory_plan.needs(
            generator.manifest,
            dims.drawing(generator.manifest.engines),
            memory_plan.sizes(generator.manifest),
            generator._engines.backend.weights_in_memory,
        ),
        key=lambda need: need.total,
    )
    with Generator(generator.path, memory_budget=largest.total) as tight:
        assert tight.no_previews() is not None
        with pytest.raises(BudgetError, match="previews need every engine in memory"):
            run(tight, preview_every=1, callback_on_step_end=lambda *_: None)
        run(tight)
    assert generator.no_previews() is None


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (3, RequestTypeError),
        ({"latents": 0}, RequestError),
        ({"tokens": np.zeros((1, 2, 3))}, RequestError),
    ],
)
def test_a_callback_that_returns_nonsense(
    generator: Generator, returned: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="callback_on_step_end"):
        run(generator, callback_on_step_end=lambda *_: returned)


def test_tokens_of_an_earlier_run_are_drawn_without_the_mllm(generator: Generator) -> None:
    first = run(generator, ["a cow", "a dog"], num_images_per_prompt=2)
    assert "injected" not in first.parameters
    again = run(generator, ["a cow", "a dog"], num_images_per_prompt=2, tokens=first.tokens)
    assert np.array_equal(again.latents, first.latents)
    assert not {"mllm_text", "visual_decode"} & again.timings.keys()
    assert again.parameters["injected"] == {"tokens": latents_file.digest(first.tokens)}
    with pytest.raises(RequestError, match=r"tokens must have the shape \[1, 16, 64\]"):
        run(generator, tokens=first.tokens)


def test_tokens_travel_in_a_file(generator: Generator, tmp_path: Path) -> None:
    first = run(generator, ["a cow", "a dog"], num_images_per_prompt=2)
    path = first.save_tokens(tmp_path / "deep" / "t.safetensors")
    request = latents_file.load(path).request()
    again = generator.run(**request)
    assert np.array_equal(again.latents, first.latents)
    assert again.parameters["injected"] == {"tokens": latents_file.digest(first.tokens)}
    assert not np.array_equal(generator.run(**{**request, "seed": 9}).latents, first.latents)


def test_special_tokens_in_a_prompt_are_ordinary_text(generator: Generator) -> None:
    """Otherwise the reader of the K/V cache would meet an image or a turn that nobody opened."""
    special = {600, 601, 602, 609, 610, 611, 612, 613, 614, 615}
    prefix = generator.manifest.text.mllm.prefix_ids
    postfix = generator.manifest.text.mllm.postfix_ids
    for text in (
        "<|image_pad|>",
        "a <|vision_start|> b",
        "<|im_end|>\n<|im_start|>",
        "<tool_call>",
    ):
        ids = generator._tokenizers.mllm_prompt(text)
        assert not special & set(ids[len(prefix) : -len(postfix)])
    run(generator, "<|im_end|><|image_pad|>")


def test_save_numbers_several_images(generator: Generator, tmp_path: Path) -> None:
    result = run(generator, num_images_per_prompt=2)
    assert [p.name for p in result.save(tmp_path / "a.png")] == ["a-0.png", "a-1.png"]
    with Image.open(tmp_path / "a-1.png") as image:
        assert np.array_equal(np.asarray(image), result.images[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-0.png", "a-1.png"]


def test_save_refuses_what_it_cannot_write(generator: Generator, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not an image format"):
        run(generator).save(tmp_path / "a.xyz")
    with pytest.raises(RequestError, match="no pixels"):
        run(generator, output_type="latent").save(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
