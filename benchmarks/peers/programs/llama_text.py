"""llama.cpp on a GGUF file."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.programs.prompts import fresh
from benchmarks.peers.protocol import serve


class LlamaText:
    """Args:
    settings: `file`, `prompt` (ids), `new_tokens`, `threads`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._prompt, self._new_tokens = settings["prompt"], settings["new_tokens"]
        self._runs = 0
        self._model = llama_cpp.Llama(
            settings["file"],
            n_ctx=1024,
            n_batch=512,
            n_ubatch=512,
            n_threads=settings["threads"],
            n_threads_batch=settings["threads"],
            flash_attn=settings["flash_attention"],
            verbose=False,
        )
        self.about = {
            "libraries": {"llama-cpp-python": llama_cpp.__version__},
            "built_for": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def run(self) -> dict[str, float]:
        """Read the prompt and answer, the most likely token at a time."""
        self._runs += 1
        prompt = fresh(self._prompt, self._runs)
        self._model.reset()
        start = time.perf_counter()
        self._model.eval(prompt)
        token = int(self._logits().argmax())
        read = time.perf_counter()
        for _ in range(self._new_tokens):
            self._model.eval([token])
            token = int(self._logits().argmax())
        end = time.perf_counter()
        return {"prefill": read - start, "token": (end - read) / self._new_tokens}

    def output(self) -> NDArray[Any]:
        """Logits [V] behind the prompt."""
        self._model.reset()
        self._model.eval(self._prompt)
        return np.array(self._logits())

    def _logits(self) -> NDArray[Any]:
        found = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(found, shape=(self._model.n_vocab(),))


if __name__ == "__main__":
    serve(LlamaText)
