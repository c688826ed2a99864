"""One file per engine: what is known of it, and the tensors that its module takes and gives.

A `Definition` needs no checkpoint and no torch: compiling reads it where there is none. A `Stage`
is an engine of one checkpoint, before it is a graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from bifrost_rt.manifest import EngineSpec, Precision, State, TensorSpec

if TYPE_CHECKING:
    from torch import nn

# By the arithmetic of a graph, its largest difference to the float32 graph on real inputs. Three
# or four times what the demo model and the golden one show: their networks have three to
# nine blocks, and errors of more blocks add up as a square root.
HALF_TOLERANCE = {"float32": 1e-6, "bfloat16": 0.04, "float16": 0.008}


@dataclass(frozen=True)
class Definition:
    """What holds for an engine whatever the checkpoint. Layers are named by their path in the
    stage's module.

    Attributes:
        tolerance: largest absolute difference to torch in float32, on real inputs.
        half_tolerance: the same for a 16-bit graph, to its float32 graph; absolute up to 1,
            relative to the largest value above.
        float32_layers: how the names of parameters begin that 16-bit graphs keep in float32. They
            are thousandths of the work, and their rounding would meet everything behind them.
        not_quantized: pattern of layers -> why they stay in 16 bit where others have 8 or fewer.
            In the order in which they are asked; the first that fits decides.
        when_short: patterns of layers that stay in 16 bit, and that give up bits where memory is
            short: `--fit` stores their weights in 4, and leaves their inputs as they are.
        residuals: lists of layers whose outputs a quality sweep compares by themselves, in the
            first call.
    """

    name: str
    tolerance: float
    half_tolerance: Mapping[str, float] = field(default_factory=lambda: HALF_TOLERANCE)
    float32_layers: tuple[str, ...] = ()
    not_quantized: Mapping[str, str] = field(default_factory=dict)
    when_short: tuple[str, ...] = ()
    residuals: tuple[str, ...] = ()

    def exception(self, path: str) -> str:
        """Say why a layer stays in 16 bit where others are quantized; empty where it does not."""
        fitting = (why for like, why in self.not_quantized.items() if fnmatchcase(path, like))
        return next(fitting, "")

    def gives_when_short(self, path: str) -> str:
        """Return the pattern of `when_short` that a layer fits; empty where there is none."""
        return next((like for like in self.when_short if fnmatchcase(path, like)), "")

    @property
    def all_in_16_bit(self) -> bool:
        """Whether none of its layers is ever quantized, unless a recipe says so."""
        return "*" in self.not_quantized


@dataclass(frozen=True)
class Stage:
    """One engine before it is a graph.

    A dimension of a tensor is a number, or what `bifrost_rt.dims` knows: a size that callers
    choose, or an expression of such sizes.

    Attributes:
        module: called with the inputs in order, returns the outputs in order.
        state: what its loop hands from step to step.
        compared: the outputs that say most when layers are quantized; default: the first.
        chosen: outputs that name the largest of others: they are not compared, since rounding
            decides among near equals.
    """

    definition: Definition
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[State, ...] = ()
    compared: tuple[str, ...] = ()
    chosen: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its engine's name."""
        return self.definition.name

    @property
    def tolerance(self) -> float:
        """Largest absolute difference to torch in float32, on real inputs."""
        return self.definition.tolerance

    def outline(self, precision: Precision | None = None) -> EngineSpec:
        """Return the engine before there is a file: its inputs, outputs and loop state."""
        unknown = Precision(requested="", weights="", compute="")
        return EngineSpec(
            name=self.name,
            graph="",
            files=(),
            inputs=self.inputs,
            outputs=self.outputs,
            state=self.state,
            precision=precision or unknown,
        )
