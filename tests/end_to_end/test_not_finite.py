"""Values that are not finite are an error that names their stage, never a black image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bifrost_rt import Generator, NumericsError, RequestError, RequestTypeError
from bifrost_rt.backends.onnxruntime import OnnxRuntime

SETTINGS: dict[str, Any] = {"seed": 7, "output_type": "np", "num_inference_steps": 4}


def draw(generator: Generator, **changes: Any) -> Any:
    return generator.run("a red circle", **{**SETTINGS, **changes})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("cfg_weight", 3e38, "engine `visual_decode`: tokens reach .*image 0"),
        ("cfg_weight", -1e25, "engine `visual_decode`: tokens reach .*image 0"),
        (
            "controlnet_conditioning_scale",
            3e38,
            "engine `denoise`: latents are not finite: 1024 of",
        ),
        ("guidance_scale", 3e38, "engine `denoise`: .*; `modulation`, which the engine was given"),
    ],
)
def test_a_huge_argument_is_named_with_the_stage_that_it_spoils(
    generator: Generator, argument: str, value: float, message: str
) -> None:
    expected = draw(generator).images
    for output_type in ("np", "pil", "latent"):
        with pytest.raises(NumericsError, match=message) as raised:
            draw(generator, **{argument: value}, output_type=output_type)
        assert raised.value.hint == f"{argument}={value:g}: use a value like the default"
    assert np.array_equal(draw(generator).images, expected)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_on_every_backend_of_the_cpu(generators: Any, backend: str) -> None:
    for argument in ("cfg_weight", "controlnet_conditioning_scale"):
        with pytest.raises(NumericsError, match="engine `"):
            draw(generators(backend), **{argument: 3e38})


def test_strong_guidance_that_stays_finite_is_drawn(generator: Generator) -> None:
    assert np.isfinite(draw(generator, cfg_weight=500.0).latents).all()


def replacing(name: str, value: Callable[[Any], Any], step: int = 2) -> Callable[..., Any]:
    def callback(g: Any, at: int, timestep: float | None, tensors: dict[str, Any]) -> Any:
        return {name: value(tensors[name])} if name in tensors and at == step else None

    return callback


@pytest.mark.parametrize("name", ["tokens", "latents"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: x * np.nan, "are not finite"),
        (lambda x: np.where(np.arange(x.shape[-1]) == 3, -np.inf, x), "are not finite"),
        (lambda x: x.astype(np.float64) * 0 + 1e300, "are not finite"),
        (lambda x: x * 0 + np.float32(1e30), r"reach 1e\+30"),
    ],
    ids=["nan", "one infinity", "beyond float32", "huge"],
)
def test_what_a_callback_returns_is_looked_at_at_once(
    generator: Generator, name: str, value: Callable[[Any], Any], message: str
) -> None:
    asked = rf"callback_on_step_end, step 2: the {name} it returned {message}"
    with pytest.raises(RequestError, match=asked):
        draw(generator, callback_on_step_end=replacing(name, value))


@pytest.mark.parametrize(
    "value",
    [
        lambda x: x.astype(complex),
        lambda x: x.astype(str),
        lambda x: [[1.0], [1.0, 2.0]],
        lambda x: x > 0,
    ],
    ids=["complex", "text", "ragged", "bool"],
)
def test_a_callback_that_returns_no_numbers(
    generator: Generator, value: Callable[[Any], Any]
) -> None:
    with pytest.raises(RequestTypeError, match="callback_on_step_end returned latents"):
        draw(generator, callback_on_step_end=replacing("latents", value))


def test_a_preview_is_not_made_of_nan(generator: Generator) -> None:
    seen: list[int] = []

    def look(g: Any, step: int, timestep: float | None, tensors: dict[str, Any]) -> None:
        seen.extend([step] * ("preview" in tensors))

    with pytest.raises(NumericsError, match="latents, as estimated at step 0, are not finite"):
        draw(
            generator,
            controlnet_conditioning_scale=3e38,
            callback_on_step_end=look,
            preview_every=1,
        )
    assert seen == []


def test_injected_arrays_are_finite_as_float32(generator: Generator) -> None:
    latents = np.full((1, 64, 16), 1e300)
    with pytest.raises(RequestError, match="latents hold a value that is not finite in float32"):
        draw(generator, latents=latents)
    with pytest.raises(RequestTypeError, match="tokens cannot be read as an array"):
        draw(generator, tokens=[[1.0], [1.0, 2.0]])


class Spoiled(OnnxRuntime):
    """onnxruntime on a machine whose arithmetic overflows in one stage: its float outputs are NaN
    in the last row, and its pixels are what NaN becomes."""

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def open(self, *arguments: Any) -> Any:
        engine = super().open(*arguments)
        if engine.spec.name == self.stage:
            bind = engine.bind

            def spoiled(inputs: Any, outputs: Any) -> Any:
                call = bind(inputs, outputs)

                def run() -> None:
                    call()
                    for array in outputs.values():
                        if array.dtype == np.float32:
                            array[-1] = np.nan
                        elif array.dtype == np.uint8:
                            array[-1] = 0

                return run

            engine.bind = spoiled
        return engine


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("mllm_text", "engine `visual_decode`: tokens are .*`text_keys.0`, which the engine was"),
        ("visual_decode", "engine `visual_decode`: tokens are not finite: 1024 of 2048 .*image 1"),
        (
            "clip_text",
            "engine `clip_text`: pooled_prompt_embeds are not finite: 32 of 64 .*prompt 1",
        ),
        ("t5_text", "engine `t5_text`: prompt_embeds are not finite: 1536 of 3072 .*prompt 1"),
        (
            "conditioning",
            "engine `denoise`: latents are .*`controlnet_context`, which the engine wa",
        ),
        (
            "control_embed",
            "engine `denoise`: latents are .*`control_condition`, which the engine was",
        ),
        (
            "denoise",
            "engine `denoise`: latents are not finite: 1024 of 2048 values .image 1.\nhint",
        ),
    ],
)
def test_wherever_it_begins_it_is_found(alpha_set: Path, stage: str, message: str) -> None:
    with Generator(alpha_set, backend=Spoiled(stage)) as generator:
        with pytest.raises(NumericsError, match=message) as raised:
            generator.run(["a cow", "a dog"], **SETTINGS)
        assert raised.value.hint == (
            "`bifrost-rt verify DIR` tells whether this machine computes what the builder did"
        )


def test_pixels_of_one_value_are_said(alpha_set: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What overflows inside the VAE is uint8 when it is seen; so is a black image."""
    with Generator(alpha_set, backend=Spoiled("vae_decode")) as generator:
        result = generator.run(["a cow", "a dog"], **SETTINGS)
    (said,) = result.warnings
    assert said.startswith("image 1: every pixel is 0; if this is no plain image, then")
    assert "which computes in float32, has overflowed" in said
    assert said in caplog.text


@pytest.mark.parametrize("stage", ["mllm_text", "t5_text", "denoise"])
def test_a_build_still_names_the_engine_that_differs(alpha_set: Path, stage: str) -> None:
    """Rather than the stage behind it whose values are looked at."""
    from bifrost_rt import manifest
    from export import parity
    from export.compile import error
    from export.errors import ParityError
    from export.stages.catalog import DEFINITIONS

    facts, backend = manifest.read(alpha_set), OnnxRuntime()
    right = {
        spec.name: error._float32(alpha_set, facts, spec, backend, DEFINITIONS[spec.name])
        for spec in facts.engines
    }
    with pytest.raises(ParityError, match=f"engine `{stage}`: differs from torch by inf"):
        parity.compare(alpha_set, facts, right, Spoiled(stage))
