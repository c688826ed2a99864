"""The seam between waiting and drawing: a painter draws one request after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bifrost_rt.generator import Generator
from bifrost_rt.pipeline import Output
from bifrost_rt.request import Request
from bifrost_rt.serve.jobs import Stage

# (stage, steps done, preview uint8 [n, H, W, 3] or None); raises to end the run.
OnStep = Callable[[Stage, int, NDArray[np.uint8] | None], None]


class Painter(Protocol):
    """Draws one request at a time, in the thread that asks."""

    def paint(self, request: Request, on_step: OnStep, preview_every: int | None) -> Output:
        """Draw. What `on_step` raises ends the run, frees what it held, and comes out again."""

    def no_previews(self) -> str | None:
        """Why it cannot show pictures as they become, or None where it can."""

    def close(self) -> None:
        """Free everything."""


class Local:
    """A generator in this process."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def paint(self, request: Request, on_step: OnStep, preview_every: int | None) -> Output:
        """Draw with the generator."""

        def after_step(
            generator: Generator, step: int, timestep: float | None, tensors: dict[str, Any]
        ) -> None:
            stage: Stage = "decoding" if "tokens" in tensors else "denoising"
            on_step(stage, step + 1, tensors.get("preview"))

        return self._generator.draw(request, after_step, preview_every)

    def no_previews(self) -> str | None:
        """The generator's own reason."""
        return self._generator.no_previews()

    def close(self) -> None:
        """Close the generator."""
        self._generator.close()
