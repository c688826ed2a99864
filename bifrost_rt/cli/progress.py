"""One line on a terminal, for as long as an image takes."""

from __future__ import annotations

import sys
from typing import Any

from bifrost_rt.manifest import Defaults

WIDTH = 24
# Carriage return, and clear what the line was.
_AGAIN = "\r\x1b[K"


class Progress:
    """A bar for each loop. Is the callback of `Generator.run`.

    Args:
        steps: of a run with these arguments; what they leave out is the set's default.
        prefix: says which prompt of how many.
    """

    def __init__(self, request: dict[str, Any], defaults: Defaults, prefix: str = "") -> None:
        self._steps = {
            "tokens": request.get("decoding_steps") or defaults.decoding_steps,
            "latents": request.get("num_inference_steps") or defaults.num_inference_steps,
        }
        self._prefix = prefix

    def __call__(
        self, generator: Any, step: int, timestep: float | None, tensors: dict[str, Any]
    ) -> None:
        """Show one more step."""
        if "thought" in tensors:
            self._show(f"thinking  {' '.join(tensors['thought'].split())[-2 * WIDTH :]}")
            return
        loop = "tokens" if "tokens" in tensors else "latents"
        done, steps = step + 1, self._steps[loop]
        bar = ("#" * (WIDTH * done // steps)).ljust(WIDTH, "-")
        name = "decoding " if loop == "tokens" else "denoising"
        self._show(f"{name} [{bar}] {done}/{steps}")

    def close(self, timings: dict[str, float], seed: int) -> None:
        """Replace the line by what the run took."""
        parts = ", ".join(f"{name} {s:.2f}" for name, s in timings.items() if name != "total")
        self._show(f"{timings['total']:.2f} s ({parts}), seed {seed}\n")

    def _show(self, text: str) -> None:
        print(f"{_AGAIN}{self._prefix}{text}", end="", file=sys.stderr, flush=True)
