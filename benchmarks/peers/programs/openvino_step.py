"""OpenVINO on diffusers' networks, converted as optimum converts them."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from benchmarks.peers.programs import stock_step
from benchmarks.peers.protocol import serve


def converted(folder: Path, weights: str) -> Path:
    """Return the file of OpenVINO's model, made once; of 16-bit or 8-bit weights, as its users
    store them."""
    path = folder / f"openvino-{weights}.xml"
    if path.exists():
        return path
    import torch

    given = [torch.from_numpy(array) for array in stock_step.inputs(folder)]
    with torch.inference_mode():
        model = ov.convert_model(stock_step.step(folder, torch.float32), example_input=given)
    if weights == "int8":
        import nncf

        model = nncf.compress_weights(model)
    aside = path.with_name(f"aside-{path.name}")
    ov.save_model(model, aside, compress_to_fp16=False)
    aside.with_suffix(".bin").rename(path.with_suffix(".bin"))
    aside.rename(path)
    return path


class OpenVinoStep:
    """Args:
    settings: `folder`, `weights` ("fp32" or "int8"), `arithmetic` ("f32" or "bf16"), `threads`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        folder = Path(settings["folder"])
        options = {
            "INFERENCE_PRECISION_HINT": settings["arithmetic"],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": settings["threads"],
        }
        path = converted(folder, settings["weights"])
        self._given = dict(enumerate(stock_step.inputs(folder)))
        self._request = ov.Core().compile_model(path, "CPU", options).create_infer_request()
        self.about = {
            "libraries": {"openvino": importlib.metadata.version("openvino")},
            "options": options,
        }

    def run(self) -> dict[str, float]:
        """Compute a step."""
        start = time.perf_counter()
        self._request.infer(self._given, share_inputs=True)
        return {"step": time.perf_counter() - start}

    def output(self) -> NDArray[Any]:
        """Compute the velocity [1, S, C]."""
        found: NDArray[Any] = np.array(self._request.infer(self._given)[0])
        return found


if __name__ == "__main__":
    serve(OpenVinoStep)
