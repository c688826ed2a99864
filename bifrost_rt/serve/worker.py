"""The seam between waiting and drawing: a worker draws a few requests at a time, or answers one
conversation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bifrost_rt.chat import ChatResult, OnText
from bifrost_rt.chat_params import ChatParameters
from bifrost_rt.generator import Generator, StepCallback
from bifrost_rt.messages import Turn
from bifrost_rt.pipeline import Output
from bifrost_rt.request import Request
from bifrost_rt.serve.jobs import Stage

# A prompt, and what the MLLM has said of it so far.
Said = tuple[str, str]
# (which request, stage, steps done, preview uint8 [n, H, W, 3] or None, what is thought or None);
# raises to end the run.
OnStep = Callable[[int, Stage, int, NDArray[np.uint8] | None, Said | None], None]


class Worker(Protocol):
    """Draws a few requests at a time, in the thread that asks."""

    def look(self, arguments: Mapping[str, Any]) -> Request:
        """Make a request of arguments of `Generator.run`, images among them."""

    def paint(
        self, requests: Sequence[Request], on_step: OnStep, preview_every: int | None
    ) -> list[Output]:
        """Draw them all. What `on_step` raises ends the run, frees what it held, and comes out
        again."""

    def answer(
        self, turns: Sequence[Turn], parameters: ChatParameters, on_text: OnText
    ) -> ChatResult:
        """Answer a conversation. What `on_text` raises ends the answer and comes out again."""

    def reloads(self) -> bool:
        """Say whether engines leave for others while it draws, so that several requests together
        are faster."""

    def no_previews(self) -> str | None:
        """Say why it cannot show images as they become, or None where it can."""

    def close(self) -> None:
        """Free everything."""


class Local:
    """A generator in this process."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def look(self, arguments: Mapping[str, Any]) -> Request:
        """Look with the generator."""
        return self._generator.ask(**arguments)

    def paint(
        self, requests: Sequence[Request], on_step: OnStep, preview_every: int | None
    ) -> list[Output]:
        """Draw with the generator."""

        def after_step_of(which: int) -> StepCallback:
            def after_step(
                generator: Generator, step: int, timestep: float | None, tensors: dict[str, Any]
            ) -> None:
                if "thought" in tensors:
                    said = (tensors["prompt"], tensors["thought"])
                    on_step(which, "thinking", step + 1, None, said)
                    return
                stage: Stage = "decoding" if "tokens" in tensors else "denoising"
                on_step(which, stage, step + 1, tensors.get("preview"), None)

            return after_step

        callbacks = [after_step_of(i) for i in range(len(requests))]
        return self._generator.draw_several(requests, callbacks, preview_every)

    def answer(
        self, turns: Sequence[Turn], parameters: ChatParameters, on_text: OnText
    ) -> ChatResult:
        """Answer with the generator."""
        return self._generator.answer(turns, parameters, on_text)

    def reloads(self) -> bool:
        """Return the generator's answer."""
        return self._generator.reloads()

    def no_previews(self) -> str | None:
        """Return the generator's own reason."""
        return self._generator.no_previews()

    def close(self) -> None:
        """Close the generator."""
        self._generator.close()
