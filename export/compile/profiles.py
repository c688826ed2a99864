"""Optimisation profiles: which sizes an engine is compiled for, from the manifest's dimensions.

A graph takes any size; an engine has a smallest, a largest and one that its kernels are chosen for.
Where the set sets no limit, one must be given, because memory is planned for the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bifrost_rt.manifest import Defaults, EngineSpec, Range, TensorSpec
from export.errors import CompileError

IMAGES, PROMPTS, TEXTS, STEPS = "images", "prompts", "texts", "steps"
# One picture at a time, without guidance, is what an edge device does all day, and the release
# reveals one token in a step.
_ONE = (IMAGES, PROMPTS, TEXTS, "branches", "revealed")
MOST = 2**31 - 1  # of one dimension: the libraries keep 32 bits, and drop what is above them

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """The inclusive bounds of every symbol, all of them finite, and the one to be fastest at."""

    bounds: Mapping[str, tuple[int, int]]

    def of(self, tensor: TensorSpec) -> tuple[Shape, Shape, Shape]:
        """The smallest, the preferred and the largest shape of a tensor."""
        least, best, most = [], [], []
        for dim in tensor.shape:
            low, high = (dim, dim) if isinstance(dim, int) else self.bounds[dim]
            least.append(low)
            best.append(low if dim in _ONE else high)
            most.append(high)
        return tuple(least), tuple(best), tuple(most)

    def ranges(self) -> dict[str, Range]:
        """The bounds as a manifest states them."""
        return {symbol: Range(low, high) for symbol, (low, high) in self.bounds.items()}


def sizes(
    dimensions: Mapping[str, Range],
    defaults: Defaults,
    max_images: int | None,
    max_steps: int | None,
) -> Sizes:
    """Bounds for a set.

    Args:
        max_images: pictures per run; needed where the set has no limit of its own.
        max_steps: steps of either loop; None takes the larger of the set's two defaults.

    Raises:
        CompileError: `images` has no limit and none was given, or one that the set or an engine
            cannot have.
    """
    if max_images is None and dimensions[IMAGES].max is None:
        raise CompileError(
            "the set draws any number of pictures in one run, an engine needs a limit: its memory "
            "is planned for the largest run",
            hint="give one, such as --max-images 1",
        )
    steps = max_steps or max(defaults.decoding_steps, defaults.num_inference_steps)
    images = max_images or dimensions[IMAGES].max
    assert images is not None
    # with guidance, one more text than images: the empty one
    limits = {IMAGES: images, PROMPTS: images, TEXTS: images + 1, STEPS: steps}
    bounds = {}
    for symbol, allowed in dimensions.items():
        high = limits.get(symbol, allowed.max)
        assert high is not None, symbol
        if high < allowed.min or (allowed.max is not None and high > allowed.max):
            raise CompileError(
                f"`{symbol}` up to {high}: the set allows {allowed.min} to {allowed.max or 'any'}",
                hint="rebuild the set with `python -m export.build --max-images N`, or ask less",
            )
        if high > MOST:
            raise CompileError(
                f"`{symbol}` up to {high}: an engine's dimensions go up to {MOST}",
                hint="ask for less with --max-images and --max-steps",
            )
        bounds[symbol] = (allowed.min, high)
    return Sizes(bounds)


def symbolic_inputs(spec: EngineSpec) -> list[TensorSpec]:
    """The inputs that need a profile."""
    return [t for t in spec.inputs if any(isinstance(dim, str) for dim in t.shape)]
