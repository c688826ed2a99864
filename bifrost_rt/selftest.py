"""A short run whose image travels with the set: does this machine draw what the builder drew?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bifrost_rt import formats
from bifrost_rt.errors import EngineSetError
from bifrost_rt.generator import Generator
from bifrost_rt.manifest import Deviation, Manifest

IMAGE = "selftest.png"
# Guided, so that both branches of the MLLM take part; few steps, so that it is soon over.
REQUEST: dict[str, Any] = {
    "prompt": "a red circle above a blue square",
    "seed": 0,
    "decoding_steps": 4,
    "cfg_weight": 2.0,
    "num_inference_steps": 2,
}
# Another processor or backend rounds differently; a wrong float32 engine differs by far more.
TOLERANCE = 2
# What one type of products may do to the image: some 10 dB below what simulating engines as they
# are compiled, on a CPU, showed against the graphs that drew it (each format has its figure, of the
# demo model), and means that fit. Where activations are rounded, random weights are worse: in 8-bit
# integers, exact on both sides, 2.2 of 255 in the mean between AVX-512 and AVX2, 1.2 between
# onnxruntime and OpenVINO.
BOUNDS = {
    declared.computes_in: declared.deviation
    for declared in formats.FORMATS.values()
    if declared.computes_in is not None and declared.deviation is not None
}
MARGIN = 4  # over a deviation that was simulated for the very set


@dataclass(frozen=True)
class SelftestResult:
    """How far an image is from the builder's, and how far it may be.

    Attributes:
        largest: of a pixel's channel, of 255.
        found: the whole image's deviation.
        allowed: the bound on it.
        why: where the bound comes from.
    """

    largest: int
    found: Deviation
    allowed: Deviation
    why: str

    @property
    def passes(self) -> bool:
        """A few levels are always allowed: an image may show little else than rounding."""
        return self.largest <= TOLERANCE or (
            self.found.psnr >= self.allowed.psnr and self.found.mean <= self.allowed.mean
        )

    def __str__(self) -> str:
        found, allowed = self.found, self.allowed
        bound = f"allowed {TOLERANCE}"
        if math.isfinite(allowed.psnr):
            bound += f", or {allowed.psnr:.1f} dB and {allowed.mean:.2g} in the mean: {self.why}"
        said = "no noise" if math.isinf(found.psnr) else f"{found.psnr:.1f} dB"
        return f"{self.largest} of 255 ({said}, {found.mean:.2g} in the mean; {bound})"


def draw(generator: Generator) -> NDArray[np.uint8]:
    """Return the self-test's image, uint8 [H, W, 3]."""
    image: NDArray[np.uint8] = generator.run(**REQUEST, output_type="np").images[0]
    return image


def expected(generator: Generator) -> NDArray[np.uint8]:
    """Return the builder's image, uint8 [H, W, 3].

    Raises:
        EngineSetError: the set has none.
    """
    path = generator.path / IMAGE
    if not path.is_file():
        raise EngineSetError(f"{path}: the set has no self-test image", hint="rebuild the set")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def deviation(found: NDArray[np.uint8], other: NDArray[np.uint8]) -> Deviation:
    """Of two images."""
    apart = found.astype(np.float64) - other
    noise = float(np.mean(apart**2))
    psnr = 10 * math.log10(255**2 / noise) if noise else math.inf
    return Deviation(psnr, float(np.mean(np.abs(apart))))


def allowed(manifest: Manifest) -> tuple[Deviation, str]:
    """Say how far a set's image may be from the builder's, and where that comes from: what was
    simulated when it was compiled, where that is known, else the loosest of `BOUNDS` that its
    engines compute in."""
    if (known := manifest.selftest) is not None:
        bound = Deviation(known.psnr - 20 * math.log10(MARGIN), known.mean * MARGIN)
        return bound, f"{MARGIN} times what was simulated when the set was compiled"
    types = {spec.precision.compute for spec in manifest.engines} & BOUNDS.keys()
    # layers whose activations are rounded, beside what most products compute in
    layers = formats.of_layers(fmt for spec in manifest.engines for fmt in spec.precision.layers)
    types |= {fmt.computes_in for fmt in layers if fmt.rounds_activations and fmt.computes_in}
    loosest = min(types, key=lambda dtype: BOUNDS[dtype].psnr, default=formats.FULL.dtype)
    return BOUNDS[loosest], f"the bound for {loosest}"


def check(generator: Generator) -> SelftestResult:
    """Draw and compare with the builder's image.

    Raises:
        EngineSetError: the set has no such image, or this machine draws another.
    """
    wanted = expected(generator)
    found = draw(generator)
    if generator.manifest.vision is not None and generator.manifest.chat is not None:
        generator.describe(found, max_new_tokens=1)  # what drawing does not run, runs too
    outcome = SelftestResult(
        int(np.abs(found.astype(int) - wanted).max()),
        deviation(found, wanted),
        *allowed(generator.manifest),
    )
    if not outcome.passes:
        raise EngineSetError(
            f"{generator.path}: the self-test's image differs from {IMAGE} by {outcome}",
            hint="the backend computes something else here; try another with --backend",
        )
    return outcome
