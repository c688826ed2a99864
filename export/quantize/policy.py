"""Which layer gets which format. Exceptions, with their reasons, stand in the engines' definitions.

A layer is named `stage:path`, as in the set's report. Without an exception a linear layer gets what
its stage was asked for, and everything that is no linear layer stays in 16 bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from bifrost_rt import serialization
from export.errors import RecipeError
from export.quantize.formats import FORMATS
from export.stages import Stage


@dataclass(frozen=True)
class Choice:
    """What one linear layer is to be, and why, where it is not simply what was asked for."""

    stage: str
    path: str
    fmt: str
    reason: str = ""

    @property
    def name(self) -> str:
        """As the report and recipes call it."""
        return f"{self.stage}:{self.path}"

    @property
    def quantized(self) -> bool:
        """Whether it leaves 16 bit."""
        return self.fmt in FORMATS


def linears(stage: Stage) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers of a stage, by path."""
    for path, module in stage.module.named_modules():
        if type(module) is nn.Linear:
            yield path, module


def choose(
    stages: Sequence[Stage],
    precision: str,
    fallback: str,
    of_stages: Mapping[str, str],
    of_layers: Mapping[str, str],
) -> list[Choice]:
    """Return a choice for every linear layer.

    Args:
        precision: what the set was asked for.
        fallback: what layers that are not quantized are stored in.
        of_stages: stage -> precision, from the recipe.
        of_layers: pattern of `stage:path` -> precision, from the recipe; the last that fits counts.

    Raises:
        RecipeError: an override that names no stage or fits no layer.
    """
    known = [stage.name for stage in stages]
    for name in of_stages:
        if name not in known:
            raise RecipeError(
                f"stages: there is no stage {name!r}{serialization.nearest(name, known)}",
                hint="the stages are " + ", ".join(known),
            )
    used: set[str] = set()
    choices = []
    for stage in stages:
        wanted = of_stages.get(stage.name, precision)
        for path, linear in linears(stage):
            name = f"{stage.name}:{path}"
            fmt, reason = wanted, ""
            if wanted in FORMATS:
                reason = stage.definition.exception(path)
                fmt = fallback if reason else wanted
            fitting = [pattern for pattern in of_layers if fnmatchcase(name, pattern)]
            used.update(fitting)
            if fitting:
                fmt, reason = of_layers[fitting[-1]], f"recipe: {fitting[-1]}"
            fmt, reason = _divisible(linear, fmt, reason, fallback)
            choices.append(Choice(stage.name, path, fmt, reason))
    for pattern in of_layers:
        if pattern not in used:
            raise RecipeError(
                f"layers: {pattern!r} fits no linear layer",
                hint="layers are named as in a set's report, such as "
                f"{choices[0].name!r}; * stands for anything",
            )
    return choices


def _divisible(linear: nn.Linear, fmt: str, reason: str, fallback: str) -> tuple[str, str]:
    block = FORMATS[fmt].block if fmt in FORMATS else None
    if block is not None and linear.in_features % block:
        return (
            fallback,
            f"its {linear.in_features} inputs are no multiple of {fmt}'s block of {block}",
        )
    return fmt, reason
