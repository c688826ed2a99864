"""diffusers in torch, as it is or compiled."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from numpy.typing import NDArray

from benchmarks.peers.programs import stock_step
from benchmarks.peers.protocol import serve


class TorchStep:
    """Args:
    settings: `folder`, `dtype`, `compiled`, `threads`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        torch.set_num_threads(settings["threads"])
        folder, dtype = Path(settings["folder"]), getattr(torch, settings["dtype"])
        self._given = [torch.from_numpy(array).to(dtype) for array in stock_step.inputs(folder)]
        self._step = stock_step.step(folder, dtype)
        if settings["compiled"]:
            self._step.compile()
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        self.about = {"libraries": versions, "processor": torch.backends.cpu.get_cpu_capability()}

    @torch.inference_mode()
    def run(self) -> dict[str, float]:
        """Compute a step."""
        start = time.perf_counter()
        self._step(*self._given)
        return {"step": time.perf_counter() - start}

    @torch.inference_mode()
    def output(self) -> NDArray[Any]:
        """Compute the velocity [1, S, C]."""
        found: NDArray[Any] = self._step(*self._given).float().numpy()
        return found


if __name__ == "__main__":
    serve(TorchStep)
