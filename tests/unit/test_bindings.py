"""The door of an engine: names, then dtype, then shape, each with its own message."""

from __future__ import annotations

import numpy as np
import pytest

from bifrost_rt.backends.base import check_bindings
from bifrost_rt.errors import EngineInputError
from bifrost_rt.manifest import EngineSpec, Precision, Range, State, TensorSpec

SPEC = EngineSpec(
    name="denoise",
    graph="denoise.onnx",
    files=("denoise.onnx",),
    inputs=(
        TensorSpec("latents", "float32", ("images", 64, 16)),
        TensorSpec("step", "int64", (1,)),
    ),
    outputs=(TensorSpec("next_latents", "float32", ("images", 64, 16)),),
    state=(State("next_latents", "latents"),),
    precision=Precision("fp32", "float32", "float32"),
)
DIMENSIONS = {"images": Range(1, 4)}
LATENTS = np.zeros((2, 64, 16), np.float32)
GOOD = {"latents": LATENTS, "step": np.zeros(1, np.int64)}


def test_what_fits_passes() -> None:
    check_bindings(SPEC, DIMENSIONS, GOOD, {"next_latents": LATENTS.copy()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": None}, "engine `denoise`: missing input latents"),
        ({"sigma": LATENTS}, "engine `denoise`: unknown input sigma"),
        (
            {"latents": LATENTS.astype(np.float16)},
            r"input `latents`: expected float32\[images, 64, 16\], got float16\[2, 64, 16\]",
        ),
        ({"latents": LATENTS[0]}, r"got float32\[64, 16\]"),
        ({"latents": np.zeros((2, 32, 16), np.float32)}, "dimension 1 must be 64"),
        ({"latents": np.zeros((5, 64, 16), np.float32)}, "1 <= images <= 4"),
        ({"latents": np.zeros((0, 64, 16), np.float32)}, "1 <= images <= 4"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    inputs = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(EngineInputError, match=message):
        check_bindings(SPEC, DIMENSIONS, inputs, {"next_latents": LATENTS})


def test_a_symbol_has_one_size_everywhere() -> None:
    with pytest.raises(EngineInputError, match=r"output `next_latents`.*dimension 0 must be 2"):
        check_bindings(SPEC, DIMENSIONS, GOOD, {"next_latents": LATENTS[:1]})
