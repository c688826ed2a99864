"""Which layer gets which format. Exceptions, with their reasons, stand in the engines' definitions.

A layer is named `stage:path`, as in the set's report. Without an exception a linear layer gets what
its stage was asked for, and everything that is no linear layer stays in 16 bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from bifrost_rt import serialization
from export import formats as declared
from export.errors import RecipeError
from export.formats.base import Format
from export.quantize.formats import FORMATS
from export.stages import Stage


@dataclass(frozen=True)
class Layer:
    """What is known of a linear layer before its weights are read.

    Attributes:
        exception: why it stays in 16 bit where others are quantized; empty where it does not.
        when_short: the pattern with which it may give up bits nevertheless, where memory is short;
            empty where it may not.
    """

    path: str
    inputs: int
    outputs: int
    exception: str = ""
    when_short: str = ""

    @property
    def weights(self) -> int:
        """How many it has."""
        return self.inputs * self.outputs


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


def layer(stage: Stage, path: str, linear: nn.Linear) -> Layer:
    """Return what is known of a linear layer."""
    about = stage.definition
    sizes = linear.in_features, linear.out_features
    return Layer(path, *sizes, about.exception(path), about.gives_when_short(path))


def choose(
    stages: Sequence[Stage],
    precision: str,
    fallback: str,
    of_stages: Mapping[str, str],
    of_patterns: Mapping[str, str],
) -> list[Choice]:
    """Return a choice for every linear layer.

    Args:
        precision: what the set was asked for.
        fallback: what layers that are not quantized are stored in.
        of_stages: stage -> precision, from the recipe.
        of_patterns: pattern of `stage:path` -> precision, from the recipe; the last that fits
            counts.

    Raises:
        RecipeError: an override that names no stage or fits no layer.
    """
    known = {
        stage.name: [layer(stage, path, linear) for path, linear in linears(stage)]
        for stage in stages
    }
    check(known, of_stages, of_patterns)
    return [
        choice
        for name, found in known.items()
        for choice in of_layers(name, found, of_stages.get(name, precision), fallback, of_patterns)
    ]


def check(
    known: Mapping[str, Sequence[Layer]],
    of_stages: Mapping[str, str],
    of_patterns: Mapping[str, str],
) -> None:
    """Refuse what a recipe says of stages and layers that are not there.

    Args:
        known: stage -> its linear layers.

    Raises:
        RecipeError: an override that names no stage or fits no layer.
    """
    for name in of_stages:
        if name not in known:
            raise RecipeError(
                f"stages: there is no stage {name!r}{serialization.nearest(name, known)}",
                hint="the stages are " + ", ".join(known),
            )
    names = [f"{stage}:{layer.path}" for stage, found in known.items() for layer in found]
    for pattern in of_patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RecipeError(
                f"layers: {pattern!r} fits no linear layer",
                hint="layers are named as in a set's report, such as "
                f"{names[0]!r}; * stands for anything",
            )


def of_layers(
    stage: str,
    found: Sequence[Layer],
    wanted: str,
    fallback: str,
    of_patterns: Mapping[str, str],
) -> list[Choice]:
    """Return a choice for every linear layer of a stage.

    Args:
        wanted: what the stage was asked for.
        fallback, of_patterns: as `choose` takes them.
    """
    choices = []
    for layer in found:
        fmt, reason = wanted, ""
        if wanted in FORMATS:
            reason = layer.exception
            fmt = fallback if reason else wanted
        fitting = [
            pattern for pattern in of_patterns if fnmatchcase(f"{stage}:{layer.path}", pattern)
        ]
        if fitting:
            fmt, reason = of_patterns[fitting[-1]], f"recipe: {fitting[-1]}"
        fmt, reason = _divisible(layer, fmt, reason, fallback)
        choices.append(Choice(stage, layer.path, fmt, reason))
    return choices


def rest(asked: Format, given: Iterable[Format], fallback: Format) -> Format:
    """Return what a stage stores that is no linear layer: float32 only where all of it is.

    Args:
        asked: what the stage was asked for.
        given: what its linear layers are.
    """
    full = declared.FULL
    if not asked.quantized and (asked != full or all(fmt == full for fmt in given)):
        return asked
    return fallback


def _divisible(layer: Layer, fmt: str, reason: str, fallback: str) -> tuple[str, str]:
    block = FORMATS[fmt].block if fmt in FORMATS else None
    if block is not None and layer.inputs % block:
        return (
            fallback,
            f"its {layer.inputs} inputs are no multiple of {fmt}'s block of {block}",
        )
    return fmt, reason
