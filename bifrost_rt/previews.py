"""What the image will be, seen from the middle of denoising.

An Euler step leaves its velocity behind: v = (x' - x) / (sigma' - sigma). Followed to the end it
arrives at x' - sigma' v, and the VAE makes that visible. The estimate costs nothing; the VAE costs
what it costs at the end.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import pipeline
from bifrost_rt.engines import Engines
from bifrost_rt.errors import BudgetError, RequestError, RequestTypeError
from bifrost_rt.manifest import SetSpec
from bifrost_rt.numerics import Checks
from bifrost_rt.request import Request


class Previews:
    """The previews of one run. `seconds` is what they have taken.

    Args:
        every: a preview after so many denoising steps, but not after the last.

    Raises:
        RequestError, RequestTypeError: `every` is not a number of steps.
    """

    def __init__(self, engines: Engines, manifest: SetSpec, request: Request, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise RequestTypeError(f"preview_every must be a whole number, got {every!r}")
        if every < 1:
            raise RequestError(f"preview_every must be at least 1, got {every}")
        self.seconds = 0.0
        self._checks = Checks(manifest, request, engines.backend.download, replaced=True)
        self._engines = engines
        self._every = every
        self._known = request.known
        self._x_t: NDArray[np.float32] = request.latents
        sigmas, plan = pipeline.denoising(manifest, request)
        self._level, self._reached = sigmas[0], plan.reached
        self._x_0: NDArray[np.float32] = request.latents

    def replaced(self, latents: NDArray[np.float32]) -> None:
        """Note that the next step starts from these latents."""
        self._x_t = latents.copy()

    def after(self, step: int, latents: NDArray[Any]) -> NDArray[np.uint8] | None:
        """Return the preview after this step, uint8 [n, H, W, 3], or None where none is due.

        Args:
            latents: [n, S, C] after the step.

        Raises:
            BudgetError: the schedule of this many images had the VAE leave.
            NumericsError: the estimate is not finite.
        """
        x_t, self._x_t = self._x_t, latents.copy()
        before, self._level = self._level, self._reached[step]
        if self._level != before:  # a step that was computed
            with np.errstate(over="ignore", invalid="ignore"):  # checked below, where it is seen
                velocity = (latents - x_t) / (self._level - before)
                self._x_0 = (latents - self._level * velocity).astype(np.float32)
        if (step + 1) % self._every or self._level == 0:
            return None
        if "vae_decode" not in self._engines.resident:
            raise BudgetError(
                "previews need `vae_decode` in memory beside `denoise`, and the memory budget is "
                "too small for that with so many images",
                hint="leave previews out, or draw fewer images at a time",
            )
        began = time.perf_counter()
        self._checks.finite("denoise", f"latents, as estimated at step {step},", self._x_0, "image")
        given = self._engines.put("vae_decode", latents=self._x_0)
        decoded = self._engines.run("vae_decode", given, {})
        image: NDArray[np.uint8] = self._engines.backend.download(decoded["images"]).copy()
        if self._known is not None:
            image = self._known.put_back(image)
        self.seconds += time.perf_counter() - began
        return image
