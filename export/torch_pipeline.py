"""The product's own pipeline over the stages' torch modules, before there is any engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bifrost_rt import pipeline, request
from bifrost_rt.backends.base import Backend, Buffer, HostMemory
from bifrost_rt.engines import Engines
from bifrost_rt.manifest import EngineSpec, Range, SetSpec
from bifrost_rt.tokenizers import Tokenizers
from export import lazy_tensors
from export.stages import Stage
from export.weight_offloading import streamed


class Torch(HostMemory):
    """A backend whose engines are torch modules.

    Args:
        kept: bytes of weights that may stay in memory while engines are open; None: all.
    """

    name = "torch"
    opens_in_threads = False  # weights are read as modules are called

    def __init__(self, stages: Mapping[str, Stage], kept: int | None = None) -> None:
        self._stages = stages
        self._kept = kept
        self._sizes = {name: _lazy_bytes(stage) for name, stage in stages.items()}

    def open(self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]) -> TorchEngine:
        """Return the stage's module, with a share of what may stay."""
        kept = self._kept
        if kept is not None:
            kept = kept * self._sizes[spec.name] // max(1, sum(self._sizes.values()))
        return TorchEngine(spec, self._stages[spec.name], kept)

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """Nothing beyond the modules, which are there already."""
        return 0


class TorchEngine:
    """One stage."""

    def __init__(self, spec: EngineSpec, stage: Stage, kept: int | None) -> None:
        self.spec = spec
        self._stage = stage
        self._weights = contextlib.ExitStack()
        self._weights.enter_context(streamed(stage.module, kept))

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return a call on these arrays."""

        def call() -> None:
            for name, value in evaluate(self._stage, inputs).items():
                np.copyto(np.asarray(outputs[name]), value.numpy())

        return call

    def close(self) -> None:
        """Let go of the weights."""
        self._weights.close()


def _lazy_bytes(stage: Stage) -> int:
    return sum(
        lazy_tensors.get(owner, name).nbytes
        for owner in stage.module.modules()
        for name in lazy_tensors.lazy(owner)
    )


def evaluate(stage: Stage, inputs: Mapping[str, Buffer]) -> dict[str, torch.Tensor]:
    """Return the stage's outputs, by name."""
    given = [torch.from_numpy(np.array(inputs[spec.name])) for spec in stage.inputs]
    with torch.inference_mode():
        found = stage.module(*given)
    found = found if isinstance(found, tuple) else (found,)
    return dict(zip((spec.name for spec in stage.outputs), found, strict=True))


def run(
    folder: Path,
    manifest: SetSpec,
    stages: Mapping[str, Stage],
    prompts: Sequence[str],
    *,
    kept: int | None = None,
    generate: pipeline.Generate = pipeline.generate,
    **options: Any,
) -> pipeline.Output:
    """Draw one image per prompt.

    Args:
        folder: holds the tokenizers that the manifest names.
        kept: see `Torch`.
        generate: what runs the engines.
        options: of `Generator.run`; what is not given has the set's default.
    """
    asked: dict[str, Any] = {"seed": 0, "output_type": "np", **options}
    checked = request.check(manifest, prompt=list(prompts), **asked)
    return draw(folder, manifest, Torch(stages, kept), checked, generate=generate)


def draw(
    folder: Path,
    manifest: SetSpec,
    backend: Backend,
    checked: request.Request,
    *,
    memory_budget: int | None = None,
    generate: pipeline.Generate = pipeline.generate,
) -> pipeline.Output:
    """Draw with a set that has no manifest file yet.

    Args:
        folder: holds the tokenizers and what the backend opens.
        memory_budget: bytes of all that is open; None: no limit.
        generate: what runs the engines.
    """
    engines = Engines(folder, manifest, backend, memory_budget)
    try:
        return generate(engines, Tokenizers(folder, manifest.text), manifest, checked)
    finally:
        engines.close()
