"""Every engine against torch, on the tensors of a real run.

The runtime itself is driven, through a backend that runs each engine and, on the same inputs, the
torch module that it was made from. So what is compared is what ships: the files of the set, on the
values that flow between its engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from bifrost_rt import dims, image_processor, pipeline, request, schedules
from bifrost_rt.answering import LEAST_CACHE
from bifrost_rt.backends.base import Backend, Buffer, Engine
from bifrost_rt.dims import IMAGES
from bifrost_rt.errors import NumericsError
from bifrost_rt.manifest import EngineSpec, ModelFacts, Range, SetSpec, Vision
from export import lazy_tensors, torch_pipeline
from export.budget import Share
from export.errors import ParityError
from export.exercise import draw_look_answer
from export.formats import FORMATS
from export.stages import Stage
from export.weight_offloading import streamed

# Long, short, beyond ASCII and with a lead-in: different lengths in one batch, and guidance on, so
# that every input of every engine takes part.
PROMPTS = (
    "a photo of a red apple and a green bench",
    "The image shows three cats sleeping on a wooden bridge over a quiet river at dusk",
    "café 猫",
)

QUESTION_TOKENS = 64  # of the question about an image, in its template, at most
STEPS = 4  # of the decoding loop, where there are so many places

# Relative error in the mean that one layer with rounded activations may add. The smallest
# difference moves some value to the next step, the next layer sees that, and after a few layers as
# much of a step differs as rounding itself costs; these add up like noise, by squares. A layer by
# itself is held to 2e-5, by the tests.


def sizes(
    text_tokens: int,
    model: ModelFacts,
    max_images: int | None,
    vision: Vision | None = None,
) -> dict[str, int]:
    """Of the run in which engines are compared, at most; it looks at the images that it draws."""
    num_visual_tokens = model.num_visual_tokens
    looked_at = {}
    if vision is not None:
        rows, columns = image_processor.grid(model.image_height, model.image_width, vision)
        windows = image_processor.windows(rows, columns, vision)
        looked_at = {"windows": windows, "vision_tokens": rows * columns}
        said = max(text_tokens, rows * columns + QUESTION_TOKENS)
        cache = max(LEAST_CACHE, 1 << said.bit_length())
        looked_at |= {"new_tokens": said, "cache_tokens": cache, "image_tokens": said}
    images = min(len(PROMPTS), max_images or len(PROMPTS))
    steps = min(STEPS, num_visual_tokens)
    return dims.of_run(
        images=images,
        prompts=images,
        guided=True,
        text_tokens=text_tokens,
        steps=steps,
        revealed=schedules.most_revealed(num_visual_tokens, steps),
        sources=images,
        **looked_at,
    )


def prompts(manifest: SetSpec) -> list[str]:
    """As many of `PROMPTS` as the set takes in one run."""
    return list(PROMPTS[: manifest.dimensions[IMAGES].max])


@dataclass
class Comparison:
    """One engine's record. Errors are absolute, over all outputs of all calls."""

    max_error: float = 0.0
    largest_value: float = 0.0
    calls: int = 0
    error_square: float = 0.0
    value_square: float = 0.0

    @property
    def relative_error(self) -> float:
        """Root of the mean square error, over that of the values."""
        return math.sqrt(self.error_square / self.value_square) if self.value_square else 0.0

    def passes(self, tolerance: float, rounded: float | None) -> bool:
        """Say whether an error is within a tolerance. Rounding grows with the values: tolerances
        are absolute up to 1, relative above.

        Args:
            rounded: the bound in the mean, for an engine with rounded activations: no bound on a
                single value holds there.
        """
        if rounded is not None:
            return self.relative_error <= rounded
        return self.max_error <= tolerance * max(1.0, self.largest_value)


def compare(
    folder: Path,
    manifest: SetSpec,
    stages: Mapping[str, Stage],
    backend: Backend,
    share: Share | None = None,
    generate: pipeline.Generate = draw_look_answer,
) -> dict[str, dict[str, Any]]:
    """Run the set in `folder` and compare every engine with its stage, in no more memory than
    `share` says.

    Args:
        generate: what runs the engines.

    Returns:
        Per engine: max_error, largest_value, tolerance, calls.

    Raises:
        ParityError: naming the engine that differs, by how much and by how much it may; or the
            stage that gives what is not finite, as torch does.
    """
    paired = PairedBackend(backend, stages, share.kept if share else None)
    checked = request.check(
        manifest,
        prompt=prompts(manifest),
        seed=0,
        num_inference_steps=3,
        decoding_steps=min(STEPS, manifest.model.num_visual_tokens),
        cfg_weight=2.0,
        output_type="np",
    )
    overflow = None
    try:
        budget = share.engines if share else None
        torch_pipeline.draw(
            folder, manifest, paired, checked, memory_budget=budget, generate=generate
        )
    except NumericsError as error:
        overflow = error  # an engine that differs from torch is the better answer
    report = {}
    for name, record in paired.records.items():
        tolerance = stages[name].tolerance
        rounded = rounding(manifest.engine(name).precision.layers)
        if not record.passes(tolerance, rounded):
            raise ParityError(
                f"engine `{name}`: differs from torch by {record.max_error:.3g} on values up to "
                f"{record.largest_value:.3g}, {record.relative_error:.2g} in the mean, allowed "
                + (f"{tolerance:.3g}" if rounded is None else f"{rounded:.2g} in the mean"),
                hint="nothing was written; please report this with the recipe and the versions",
            )
        report[name] = {
            "max_error": record.max_error,
            "largest_value": record.largest_value,
            "relative_error": record.relative_error,
            "tolerance": tolerance if rounded is None else rounded,
            "calls": record.calls,
        }
    if overflow is not None:
        raise ParityError(overflow.message, hint=overflow.hint) from overflow
    return report


def rounding(layers: Mapping[str, int]) -> float | None:
    """Return what an engine may differ by in the mean, from its layers by format; None where it
    rounds no activations."""
    bounds = {name: FORMATS[name].rounding or 0.0 for name in layers if name in FORMATS}
    found = sum(bounds[name] ** 2 * count for name, count in layers.items() if name in bounds)
    return math.sqrt(found) if found else None


class PairedBackend:
    """A backend beside torch. Buffers are the backend's own, which must be host memory."""

    name = "paired"
    opens_in_threads = False
    scratch_share = 1.0
    in_host_memory = True
    writes_in_place = True

    def __init__(self, backend: Backend, stages: Mapping[str, Stage], kept: int | None) -> None:
        self._backend = backend
        self._stages = stages
        self._kept = kept
        self.records: dict[str, Comparison] = {}

    def open(self, folder: Path, spec: EngineSpec, dimensions: Mapping[str, Range]) -> Engine:
        """Return the backend's engine, with the stage beside it."""
        record = self.records[spec.name] = Comparison()
        engine = self._backend.open(folder, spec, dimensions)
        return PairedEngine(engine, self._stages[spec.name], record, self._kept)

    def free_memory(self) -> int | None:
        """Return the backend's."""
        return self._backend.free_memory()

    def weights_in_memory(self, spec: EngineSpec, stored: int) -> int:
        """Return the backend's, and what torch keeps."""
        tensors = lazy_tensors.named(self._stages[spec.name].module).values()
        kept = 4 * sum(math.prod(source.shape) for source in tensors)
        if self._kept is not None:
            kept = min(kept, self._kept)
        return self._backend.weights_in_memory(spec, stored) + kept

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """Return the backend's."""
        return self._backend.empty(shape, dtype)

    def upload(self, array: NDArray[Any]) -> Buffer:
        """Return the backend's."""
        return self._backend.upload(array)

    def write(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Return the backend's."""
        self._backend.write(buffer, array)

    def download(self, buffer: Buffer) -> NDArray[Any]:
        """Return the backend's."""
        return self._backend.download(buffer)

    def wait(self) -> None:
        """Return the backend's."""
        self._backend.wait()


class PairedEngine:
    """One engine and its torch module."""

    def __init__(self, engine: Engine, stage: Stage, record: Comparison, kept: int | None) -> None:
        self.spec = engine.spec
        self._engine, self._stage, self._record = engine, stage, record
        self._weights = ExitStack()
        self._weights.enter_context(streamed(stage.module, kept))

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        """Return a call that runs both and records the difference."""
        run = self._engine.bind(inputs, outputs)

        def call() -> None:
            wanted = torch_pipeline.evaluate(self._stage, inputs)
            run()
            for name in wanted.keys() - set(self._stage.chosen):
                expected = wanted[name]
                self._compare(expected, torch.from_numpy(np.asarray(outputs[name])))

        return call

    def _compare(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        record = self._record
        record.calls += 1
        wide = expected.to(torch.float64)
        error = (wide - found.to(torch.float64)).abs().max().item()
        # NaN must not pass as small
        record.max_error = max(record.max_error, error if error == error else float("inf"))
        record.largest_value = max(record.largest_value, wide.abs().max().item())
        record.error_square += (wide - found.to(torch.float64)).square().sum().item()
        record.value_square += wide.square().sum().item()

    def close(self) -> None:
        """Close the backend's engine, and let go of torch's weights."""
        self._engine.close()
        self._weights.close()
