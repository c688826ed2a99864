"""What each group of layers costs, measured; and a set that keeps to a quality budget.

One group at a time is quantized, everything else stays as it was trained, and the chain draws the
same images as in float32. Three figures say where an error is and what becomes of it:

    tokens      cosine of the CLIP latents that the MLLM hands over
    residuals   error of the ControlNet's residuals in the first denoising step
    image     PSNR, the mean over the prompts

and `output` is the error of the group's own stage on the very inputs that it has in float32.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bifrost_rt.dims import IMAGES
from bifrost_rt.manifest import SetSpec
from export import torch_pipeline
from export.errors import PrecisionError
from export.quantize import apply
from export.quantize.apply import Decision
from export.stages import Stage
from export.weight_offloading import streamed

PROMPTS = 4
SEED = 20
SAME = 100.0  # dB, what identical images count as
Buffers = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Drawn:
    """What the chain leaves behind: tokens [n, N, D], residuals of the first step, images."""

    tokens: NDArray[np.float32]
    residuals: Tensor
    images: NDArray[np.uint8]


@dataclass(frozen=True)
class Cost:
    """What quantizing costs, against float32.

    Attributes:
        output: relative error of the stage's first output on its inputs in float32; None for
            several stages together, and of one that drawing does not call.
        tokens: cosine.
        residuals: relative error.
        psnr: dB.
    """

    output: float | None
    tokens: float
    residuals: float
    psnr: float


@dataclass(frozen=True)
class Sweep:
    """Attributes:
    stages: every stage alone, and `all` together.
    groups: every group alone.
    kept: the groups that stay in 16 bit.
    psnr: of the images with these kept.
    """

    stages: dict[str, Cost]
    groups: dict[str, Cost]
    kept: tuple[str, ...]
    psnr: float

    def record(self, budget: float) -> dict[str, Any]:
        """For the report."""
        return {"budget": budget, **asdict(self)}


class Bench:
    """The chain on a few prompts, in float32 and with some of its layers quantized."""

    def __init__(
        self,
        folder: Path,
        manifest: SetSpec,
        stages: Mapping[str, Stage],
        prompts: Sequence[str],
        kept: int | None = None,
    ) -> None:
        self._kept = kept
        self._folder, self._manifest, self._stages = folder, manifest, stages
        self._prompts = prompts[: min(PROMPTS, manifest.dimensions[IMAGES].max or PROMPTS)]
        self.prompts = len(self._prompts)
        self._calls: dict[str, tuple[Buffers, Tensor]] = {}
        with contextlib.ExitStack() as watched:
            for stage in stages.values():
                watched.enter_context(self._recorded(stage))
            self._exact = self._draw()

    def cost(self, decisions: Sequence[Decision]) -> Cost:
        """Of quantizing as decided, and nothing else."""
        touched = {d.choice.stage for d in decisions if d.scales is not None}
        with apply.replaced(self._stages, decisions):
            found = self._draw()
            alone = len(touched) == 1 and touched <= self._calls.keys()
            output = self._output(*touched) if alone else None
        return Cost(
            output,
            _cosine(found.tokens, self._exact.tokens),
            _relative(found.residuals, self._exact.residuals),
            psnr(found.images, self._exact.images),
        )

    def _draw(self) -> Drawn:
        first: dict[str, Tensor] = {}
        with contextlib.ExitStack() as open_:
            for stage in self._stages.values():
                for name, module in stage.module.named_modules():
                    if name.rpartition(".")[0] in stage.definition.residuals:
                        open_.enter_context(_first_output(module, name, first))
            made = torch_pipeline.run(
                self._folder,
                self._manifest,
                self._stages,
                self._prompts,
                kept=self._kept,
                seed=SEED,
            )
        assert made.images is not None
        residuals = [first[name].flatten() for name in sorted(first)] or [torch.zeros(1)]
        return Drawn(made.tokens, torch.cat(residuals), made.images)

    @contextlib.contextmanager
    def _recorded(self, stage: Stage) -> Iterator[None]:
        """Keep what a stage gets and gives in its first call."""

        def look(_: Any, given: tuple[Tensor, ...], result: Any) -> None:
            if stage.name not in self._calls:
                names = [spec.name for spec in stage.inputs]
                inputs = {n: t.numpy().copy() for n, t in zip(names, given, strict=True)}
                self._calls[stage.name] = inputs, _compared(stage, result).clone()

        handle = stage.module.register_forward_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def _output(self, name: str) -> float:
        stage = self._stages[name]
        inputs, exact = self._calls[name]
        with streamed(stage.module, self._kept):
            found = tuple(torch_pipeline.evaluate(stage, inputs).values())
        return _relative(_compared(stage, found), exact)


def _compared(stage: Stage, result: Any) -> Tensor:
    """Return the outputs that say most, joined."""
    outputs = result if isinstance(result, tuple) else (result,)
    named = dict(zip((spec.name for spec in stage.outputs), outputs, strict=True))
    chosen = stage.compared or (stage.outputs[0].name,)
    return torch.cat([named[name].float().flatten() for name in chosen])


@contextlib.contextmanager
def _first_output(module: torch.nn.Module, name: str, into: dict[str, Tensor]) -> Iterator[None]:
    def look(_: Any, given: Any, result: Tensor) -> None:
        into.setdefault(name, result.detach().clone())

    handle = module.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def group_of(decision: Decision) -> str:
    """`stage:block` of a layer: its path up to the first number."""
    match = re.match(r".*?\.\d+(?=\.)", decision.choice.path)
    return f"{decision.choice.stage}:{match[0] if match else decision.choice.path}"


def sweep(
    bench: Bench, decisions: Sequence[Decision], budget: float, say: Callable[[str], None]
) -> Sweep:
    """Measure every group, then keep the costliest in 16 bit until the images keep `budget` dB.

    How many must stay is found by halving: with more of the worst kept, images get better.

    Raises:
        PrecisionError: they do not keep it with all layers in 16 bit.
    """
    active = [d for d in decisions if d.scales is not None]
    members: dict[str, list[Decision]] = {}
    for decision in active:
        members.setdefault(group_of(decision), []).append(decision)
    stages = {}
    for name in dict.fromkeys(d.choice.stage for d in active):
        say(f"measuring {name}, quantized alone")
        stages[name] = bench.cost([d for d in active if d.choice.stage == name])
    stages["all"] = bench.cost(active)
    groups = {}
    for name, layers in members.items():
        say(f"measuring {name}, quantized alone")
        groups[name] = bench.cost(layers)
    worst_first = sorted(groups, key=lambda name: groups[name].psnr)

    def reached(kept: int) -> float:
        say(f"measuring with {kept} of {len(worst_first)} groups in 16 bit")
        return bench.cost([d for name in worst_first[kept:] for d in members[name]]).psnr

    found = {0: stages["all"].psnr}
    low, high = 0, len(worst_first)  # the number to keep is in low…high
    while low < high:
        middle = (low + high) // 2
        if middle not in found:
            found[middle] = reached(middle)
        low, high = (low, middle) if found[middle] >= budget else (middle + 1, high)
    if low not in found:
        found[low] = reached(low)
    if found[low] < budget:
        raise PrecisionError(
            f"quality budget {budget:g} dB: with every layer in 16 bit the images keep "
            f"{found[low]:.1f} dB",
            hint="ask for less",
        )
    return Sweep(stages, groups, tuple(worst_first[:low]), found[low])


def keep(decisions: Sequence[Decision], kept: Sequence[str], fallback: str) -> list[Decision]:
    """Return the decisions with some groups in 16 bit, for the budget's sake."""
    return [
        Decision(d.choice, fallback, "quality budget: its group costs the image most")
        if d.scales is not None and group_of(d) in kept
        else d
        for d in decisions
    ]


def psnr(found: NDArray[np.uint8], exact: NDArray[np.uint8]) -> float:
    """Of uint8 images [n, H, W, 3]: dB, the mean over the images."""
    errors = np.square(found.astype(np.float64) - exact).mean(axis=(1, 2, 3))
    each = [SAME if e == 0 else min(SAME, 10 * np.log10(255**2 / e)) for e in errors]
    return float(np.mean(each))


def noise(decibels: float) -> float:
    """Return the mean square error behind a PSNR, over the square of the largest value; 0 where
    the images were identical."""
    return 0.0 if decibels >= SAME else float(10.0 ** (-decibels / 10))


def _cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.sum(a * b, dtype=np.float64) / (np.linalg.norm(a) * np.linalg.norm(b)))


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp(min=1e-30))
