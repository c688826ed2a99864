"""Our text engine, answering as in a conversation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine
from benchmarks.peers.model_files import read
from benchmarks.peers.programs.prompts import fresh
from benchmarks.peers.protocol import serve
from bifrost_rt import backends, dims, text_inputs
from bifrost_rt.answering import Answering, Conversation, Sampling
from bifrost_rt.engines import Engines


class OwnText:
    """One engine of a set, with the loop that a conversation runs.

    Args:
        settings: `folder`, `form` and `backend` of the engine, `prompt` (ids), `new_tokens`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        folder = Path(settings["folder"])
        spec = read(folder)[settings["form"]]
        self._prompt, self._runs = settings["prompt"], 0
        self._new_tokens = settings["new_tokens"]
        hidden = spec.output("masked_token").shape[2]
        assert isinstance(hidden, int)
        # what a run of this engine reads of a manifest
        manifest: Any = SimpleNamespace(
            name="text",
            engines=(spec,),
            engine=lambda name: spec,
            model=SimpleNamespace(hidden_size=hidden),
            dimensions=dims.ranges(max_images=1, chunk=dims.CHUNK, context=dims.CONTEXT),
        )
        backend = backends.load(settings["backend"])
        self._engines = Engines(folder, manifest, backend)
        self._answering = Answering(self._engines, manifest, reuse=False)
        self.about = {
            "weights": spec.precision.layers or spec.precision.weights,
            "libraries": machine.describe()["libraries"],
        }

    def run(self) -> dict[str, float]:
        """Read the prompt and answer; a token's time is that of the engine's steps."""
        self._runs += 1
        ids = np.array(fresh(self._prompt, self._runs), np.int64)
        asked = Conversation(ids, np.tile(np.arange(len(ids)), (3, 1)))
        timings: dict[str, float] = {}
        tokens = list(
            self._answering.answer(
                asked,
                Sampling(),
                max_new_tokens=self._new_tokens + 1,
                stop_ids=(),
                timings=timings,
            )
        )
        return {
            "prefill": timings["prefill"],
            "token": timings["decode"] / (len(tokens) - 1),
        }

    def output(self) -> NDArray[Any]:
        """Logits [V] behind the prompt."""
        spec = self._engines.spec(text_inputs.NAME)
        given = text_inputs.prompts(spec, [self._prompt], len(self._prompt))
        inputs = self._engines.put(text_inputs.NAME, **given)
        outputs = self._engines.run(text_inputs.NAME, inputs, {})
        logits: NDArray[Any] = np.array(self._engines.backend.download(outputs["logits"])[0])
        return logits


if __name__ == "__main__":
    serve(OwnText)
