"""From the prompt to the image, against the official implementation's recordings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bifrost_rt import Generator, backends
from tests.conftest import Case, difference, load_case

TOLERANCE = 1e-4


EXACT = sorted(name for name, backend in backends.BACKENDS.items() if backend.exact)


@pytest.mark.parametrize("backend", EXACT)
def test_tokens_latents_and_image_are_those_of_the_reference(
    case: Case, backend: str, generators: Callable[[str], Generator]
) -> None:
    generator = generators(backend)
    tokens, latents = [], []

    def keep(
        generator: Generator, step: int, timestep: float | None, tensors: dict[str, Any]
    ) -> None:
        assert step == len(tokens if "tokens" in tensors else latents)
        if "tokens" in tensors:
            assert timestep is None
            tokens.append(tensors["tokens"])
        else:
            assert timestep == pytest.approx(case.tensors["flux.timesteps"][step])
            latents.append(tensors["latents"])

    result = generator.run(**case.request(), callback_on_step_end=keep)

    expected = case.tensors
    assert difference(np.stack(tokens), expected["mllm.tokens_steps"]) < TOLERANCE
    assert difference(np.stack(latents), expected["flux.latents_steps"]) < TOLERANCE
    assert difference(result.tokens, expected["mllm.tokens_final"]) < TOLERANCE
    assert difference(result.latents, expected["flux.latents_steps"][-1]) < TOLERANCE
    pixels = np.stack([np.asarray(image) for image in result.images])
    assert pixels.dtype == np.uint8
    assert difference(pixels, expected["flux.image_u8"]) <= 1


def test_bf16_arithmetic_is_close_and_is_not_exact(
    generators: Callable[[str], Generator],
) -> None:
    case = load_case("case_01")
    result = generators("openvino-bf16").run(**case.request(), output_type="np")
    largest = float(np.abs(case.tensors["mllm.tokens_final"]).max())
    # 8 bits of mantissa in every operation of a network with random weights
    error = difference(result.tokens, case.tensors["mllm.tokens_final"])
    assert error < 0.2 * largest
    assert np.abs(result.images.astype(int) - case.tensors["flux.image_u8"]).mean() < 8
    if _computes_in_bf16():
        assert error > TOLERANCE


def _computes_in_bf16() -> bool:
    """Whether this processor does; OpenVINO stays in float32 on others, without a word."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
