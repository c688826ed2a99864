"""What edits and compositions are compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.reference import Reference
from bifrost_rt import Generator, request
from tests.conftest import ALPHA

# Two prompts of the reference, and a run of them with guidance.
PROMPTS = ["a cow", "three boats on a lake"]


@pytest.fixture
def reference(generator: Generator) -> Reference:
    """The official loop on the golden checkpoint."""
    folders = {part: str(ALPHA / part) for part in ("mllm", "bifrost", "flux")}
    text = generator.manifest.text
    return Reference(
        **folders, mllm_max_length=text.mllm.max_length, t5_max_length=text.t5.max_length
    )


def settings_of(generator: Generator, rng: np.random.Generator) -> dict[str, Any]:
    """Arguments of a run of `PROMPTS`, for the reference and for ours."""
    places = generator.manifest.model.num_visual_tokens
    return {
        "order": np.stack([rng.permutation(places) for _ in PROMPTS]),
        "latents": request.check(generator.manifest, prompt=PROMPTS, seed=4).latents,
        "decoding_steps": 4,
        "num_inference_steps": 2,
        "cfg_weight": 2.5,
        "guidance_scale": 3.5,
        "controlnet_conditioning_scale": 0.7,
    }
