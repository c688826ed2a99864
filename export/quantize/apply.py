"""A policy and statistics -> the stages' modules, changed in place, each decision on record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from bifrost_rt.backends.base import return_freed_memory
from export import lazy_tensors
from export.quantize import scales
from export.quantize.formats import FORMATS
from export.quantize.linear import QuantizedLinear
from export.quantize.policy import Choice
from export.quantize.scales import Scales
from export.quantize.statistics import Observer, Statistics
from export.stages import Stage

# Below it, an int8 layer's own error is a quarter of its output: no image survives that.
LEAST_SIGNAL_TO_NOISE = 12.0


@dataclass(frozen=True)
class Decision:
    """What one layer became.

    Attributes:
        asked, given: formats; `given` differs where the data spoke against `asked`.
        reason: of an exception, a smoothing or a difference; empty where there is none.
        scales: None where it is not quantized.
    """

    choice: Choice
    given: str
    reason: str
    scales: Scales | None = None

    def record(self) -> dict[str, object]:
        """For the report."""
        line: dict[str, object] = {"asked": self.choice.fmt, "given": self.given}
        if self.reason:
            line["reason"] = self.reason
        if self.scales is not None and self.scales.input_scale is not None:
            line["input_scale"] = self.scales.input_scale
        if self.scales is not None and self.scales.signal_to_noise is not None:
            line["predicted_signal_to_noise"] = round(self.scales.signal_to_noise, 1)
        return line


def decide(
    stages: Mapping[str, Stage],
    choices: Sequence[Choice],
    statistics: Statistics | None,
    fallback: str,
    method: str,
) -> list[Decision]:
    """Return what every layer becomes, from what was seen of its inputs and outputs."""
    seen = {} if statistics is None else statistics.layers
    decisions = []
    for choice in choices:
        decisions.append(
            _decide(stages[choice.stage], choice, seen.get(choice.name), fallback, method)
        )
        return_freed_memory()  # a layer's copies are many, and of all sizes
    return decisions


def _decide(
    stage: Stage, choice: Choice, seen: Observer | None, fallback: str, method: str
) -> Decision:
    if not choice.quantized:
        return Decision(choice, choice.fmt, choice.reason)
    weight = lazy_tensors.read(stage.module.get_submodule(choice.path), "weight").float().T
    if not torch.any(weight):
        return Decision(choice, fallback, "all its weights are 0: there is nothing to scale")
    if not FORMATS[choice.fmt].calibrated:
        return Decision(choice, choice.fmt, choice.reason, Scales(None))
    if seen is None or seen.rows == 0:
        return Decision(choice, fallback, "never reached in calibration: its inputs are not known")
    if seen.largest == 0:
        return Decision(
            choice, fallback, "saw only zeros in calibration: there is nothing to scale"
        )
    found = scales.choose(seen, weight, choice.fmt, method)
    if found.signal_to_noise is not None and found.signal_to_noise < LEAST_SIGNAL_TO_NOISE:
        return Decision(
            choice,
            fallback,
            f"outliers: {choice.fmt} would leave {found.signal_to_noise:.0f} dB of its output, "
            f"less than {LEAST_SIGNAL_TO_NOISE:.0f}",
        )
    reason = "; ".join(text for text in (choice.reason, found.note) if text)
    return Decision(choice, choice.fmt, reason, found)


def replace(stages: Mapping[str, Stage], decisions: Sequence[Decision]) -> None:
    """Put quantized layers where linear layers were."""
    for decision in decisions:
        if decision.scales is not None:
            module = stages[decision.choice.stage].module
            layer = QuantizedLinear(
                module.get_submodule(decision.choice.path),
                decision.given,
                decision.scales.input_scale,
                decision.scales.smoothing,
            )
            module.set_submodule(decision.choice.path, layer)


@contextlib.contextmanager
def replaced(stages: Mapping[str, Stage], decisions: Sequence[Decision]) -> Iterator[None]:
    """`replace`, for as long as the context lasts."""
    before = [
        (stages[d.choice.stage].module, d.choice.path) for d in decisions if d.scales is not None
    ]
    linears = [module.get_submodule(path) for module, path in before]
    replace(stages, decisions)
    try:
        yield
    finally:
        for (module, path), linear in zip(before, linears, strict=True):
            module.set_submodule(path, linear)
