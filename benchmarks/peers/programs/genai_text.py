"""OpenVINO GenAI on the same model.

GenAI reads the GGUF file and makes OpenVINO's model of it. Weights of 8 bits are those of the file
(one scale for 32 values, `weights` "q8_0"), or one scale for each row, as `optimum-cli export
openvino --weight-format int8` makes them (`weights` "int8", by NNCF from 16 bits).
"""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai
from numpy.typing import NDArray

from benchmarks.peers.programs.prompts import fresh
from benchmarks.peers.protocol import serve

MODEL, KEPT = "openvino_model.xml", "made"


def converted(file: Path, folder: Path) -> Path:
    """Return the folder of OpenVINO's model and tokenizers, which GenAI makes of a GGUF file."""
    if not (folder / KEPT).exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / file.name).symlink_to(file)
        openvino_genai.LLMPipeline(str(folder / file.name), "CPU", enable_save_ov_model=True)
        (folder / KEPT).touch()
    return folder


def compressed(source: Path, folder: Path) -> Path:
    """Return the folder of the same model with weights of 8 bits."""
    if not (folder / KEPT).exists():
        import nncf

        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(MODEL, "*.bin", "*.gguf"))
        for name in source.glob("openvino_*tokenizer*"):
            shutil.copy(name, folder)
        model = ov.Core().read_model(source / MODEL)
        ov.save_model(nncf.compress_weights(model), folder / MODEL)
        (folder / KEPT).touch()
    return folder


class GenaiText:
    """Args:
    settings: `file` (GGUF), `weights`, `arithmetic` ("f32", "bf16" or "" for what OpenVINO
        chooses), `prompt` (ids), `new_tokens`, `threads`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        file = Path(settings["file"])
        folder = converted(file, file.parent / f"openvino-{file.stem}")
        if settings["weights"] == "int8":
            folder = compressed(folder, file.parent / "openvino-int8")
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": settings["threads"]}
        if settings["arithmetic"]:
            options["INFERENCE_PRECISION_HINT"] = settings["arithmetic"]
        self._new_tokens = settings["new_tokens"]
        self._prompt, self._runs = settings["prompt"], 0
        self._model, self._options = folder / MODEL, options
        self._pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **options)
        names = ("openvino", "openvino-genai")
        self.about = {
            "libraries": {name: importlib.metadata.version(name) for name in names},
            "options": options,
        }

    def run(self) -> dict[str, float]:
        """Read the prompt and answer, by GenAI's own clock."""
        asked = openvino_genai.GenerationConfig(
            max_new_tokens=self._new_tokens + 1, ignore_eos=True, do_sample=False
        )
        self._runs += 1  # the pipeline keeps what prompts begin with in common
        ids = np.array([fresh(self._prompt, self._runs)], np.int64)
        given = openvino_genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        found = self._pipeline.generate(given, asked)
        metrics = found.perf_metrics
        return {
            "prefill": metrics.get_ttft().mean / 1000,
            "token": metrics.get_tpot().mean / 1000,
        }

    def output(self) -> NDArray[Any]:
        """Logits [V] behind the prompt, of the model as OpenVINO runs it."""
        compiled = ov.Core().compile_model(self._model, "CPU", self._options)
        request = compiled.create_infer_request()
        ids = np.array([self._prompt], np.int64)
        given = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.arange(ids.shape[1])[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits: NDArray[Any] = np.array(request.infer(given)["logits"][0, -1])
        return logits


if __name__ == "__main__":
    serve(GenaiText)
