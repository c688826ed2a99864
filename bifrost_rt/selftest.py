"""A short run whose picture travels with the set: does this machine draw what the builder drew?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt.errors import EngineSetError
from bifrost_rt.generator import Generator

PICTURE = "selftest.png"
# Guided, so that both branches of the MLLM take part; few steps, so that it is soon over.
REQUEST: dict[str, Any] = {
    "prompt": "a red circle above a blue square",
    "seed": 0,
    "decoding_steps": 4,
    "cfg_weight": 2.0,
    "num_inference_steps": 2,
}
# Another processor or backend rounds differently; a wrong engine differs by far more.
TOLERANCE = 2
# Where activations are rounded, the smallest difference moves some value to the next step, and all
# behind it. Measured in the mean of a picture, with random weights in int8, all exact: 2.2 of 255
# between AVX-512 and AVX2, 1.2 between onnxruntime and OpenVINO. No bound on a single value holds.
ROUNDED = {"int8", "fp8", "nvfp4"}
TOLERANCE_IN_THE_MEAN = 8


def draw(generator: Generator) -> NDArray[np.uint8]:
    """The self-test's picture, uint8 [H, W, 3]."""
    image: NDArray[np.uint8] = generator.run(**REQUEST, output_type="np").images[0]
    return image


def check(generator: Generator) -> int:
    """Draw and compare with the builder's picture.

    Returns:
        The largest difference of a pixel's channel: at most `TOLERANCE`, or in a set whose
        activations are rounded, one that is at most `TOLERANCE_IN_THE_MEAN` in the mean.

    Raises:
        EngineSetError: the set has no such picture, or this machine draws another.
    """
    path = generator.path / PICTURE
    if not path.is_file():
        raise EngineSetError(f"{path}: the set has no self-test picture", hint="rebuild the set")
    with Image.open(path) as picture:
        expected = np.asarray(picture.convert("RGB"))
    found = draw(generator)
    apart = np.abs(found.astype(int) - expected)
    difference, mean = int(apart.max()), float(apart.mean())
    rounded = any(ROUNDED & spec.precision.layers.keys() for spec in generator.manifest.engines)
    wrong, allowed = f"{difference} of 255", f"{TOLERANCE}"
    if rounded:
        wrong, allowed = f"{mean:.1f} of 255 in the mean", f"{TOLERANCE_IN_THE_MEAN}"
    if mean > TOLERANCE_IN_THE_MEAN if rounded else difference > TOLERANCE:
        raise EngineSetError(
            f"{generator.path}: the self-test's picture differs by {wrong} from {PICTURE}, "
            f"allowed {allowed}",
            hint="the backend computes something else here; try another with --backend",
        )
    return difference
