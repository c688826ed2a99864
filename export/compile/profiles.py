"""Optimisation profiles: which sizes an engine is compiled for, from the manifest's dimensions.

A graph takes any size; an engine has a smallest, a largest and one that its kernels are chosen for.
Where the set sets no limit, one must be given, because memory is planned for the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bifrost_rt.dims import DIMS, IMAGES, shape_at
from bifrost_rt.manifest import Defaults, EngineSpec, Range, TensorSpec
from export.errors import CompileError

MOST = 2**31 - 1  # of one dimension: the libraries keep 32 bits, and drop what is above them

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sizes:
    """The inclusive bounds of every symbol, all of them finite, and the one to be fastest at."""

    bounds: Mapping[str, tuple[int, int]]

    def of(self, tensor: TensorSpec) -> tuple[Shape, Shape, Shape]:
        """Return the smallest, the preferred and the largest shape of a tensor."""
        least = {name: low for name, (low, _) in self.bounds.items()}
        most = {name: high for name, (_, high) in self.bounds.items()}
        best = {n: (least if DIMS[n].optimum == "min" else most)[n] for n in self.bounds}
        low, middle, high = (shape_at(tensor.shape, sizes) for sizes in (least, best, most))
        return low, middle, high

    def ranges(self) -> dict[str, Range]:
        """Return the bounds as a manifest states them."""
        return {symbol: Range(low, high) for symbol, (low, high) in self.bounds.items()}


def sizes(
    dimensions: Mapping[str, Range],
    defaults: Defaults,
    max_images: int | None,
    max_steps: int | None,
) -> Sizes:
    """Bounds for a set.

    Args:
        max_images: images per run; needed where the set has no limit of its own.
        max_steps: steps of either loop; None takes the larger of the set's two defaults.

    Raises:
        CompileError: `images` has no limit and none was given, or one that the set or an engine
            cannot have.
    """
    if max_images is None and dimensions[IMAGES].max is None:
        raise CompileError(
            "the set draws any number of images in one run, an engine needs a limit: its memory "
            "is planned for the largest run",
            hint="give one, such as --max-images 1",
        )
    steps = max_steps or max(defaults.decoding_steps, defaults.num_inference_steps)
    images = max_images or dimensions[IMAGES].max
    assert images is not None
    limits = {"max_images": images, "max_steps": steps}
    bounds = {}
    for symbol, allowed in dimensions.items():
        if symbol not in DIMS:
            raise CompileError(
                f"the set has a size `{symbol}`, which this version does not know",
                hint="compile with the version that built the set, or rebuild it",
            )
        dim = DIMS[symbol]
        limit = dim.limit(limits) if isinstance(dim.max, str) else None
        high = allowed.max if limit is None else limit
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
    """Return the inputs that need a profile."""
    return [t for t in spec.inputs if any(isinstance(dim, str) for dim in t.shape)]
