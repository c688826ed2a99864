"""Stages at the widths of a model, cut in depth, with random weights.

They are what a benchmark of true widths compiles or runs where the whole model does not fit.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from bifrost_rt import serialization
from bifrost_rt.dims import TEXT_TOKENS, shape_at
from bifrost_rt.manifest import EngineSpec, Precision
from export.compile import bound
from export.errors import RecipeError
from export.formats import FORMATS, HALF

if TYPE_CHECKING:
    from export.quantize.statistics import Statistics
    from export.stages import Stage
    from export.synthetic.shapes import Shapes

LARGEST_INPUT = 8.0  # what the made-up scales of activations hold


def stored_as(compute: str) -> str:
    """Return the form of the graph that is compiled to compute so: float32 is a bfloat16 set's."""
    return compute if FORMATS[compute].quantized else HALF.name


def written(
    folder: Path,
    stages: Sequence[str],
    shapes: Shapes,
    forms: Sequence[str],
    *,
    holes: bool = False,
) -> Iterator[EngineSpec]:
    """Yield the stages' graphs as files in `folder`, in every form, which `precision.requested`
    names.

    Args:
        forms: "fp32", "bf16" or a quantized one: what `export.build` makes of the same layers, on
            scales that are made up; the rest is bfloat16.
        holes: nothing is stored, the graphs have their weights as inputs, in bfloat16.

    Raises:
        RecipeError: there is no such stage.
    """
    from export import assemble
    from export.checkpoint import Checkpoint
    from export.synthesize import synthesize

    parts = [folder / "checkpoint" / name for name in ("mllm", "bifrost", "flux")]
    synthesize(shapes, folder / "checkpoint", seed=None if holes else 0)
    known: list[str] = []
    for fmt in forms:
        known.clear()
        checkpoint = Checkpoint(parts[0], parts[1], parts[2], read=False)
        facts = assemble.facts(checkpoint)
        for stage in assemble.stages(checkpoint, facts, checkpoint.max_seq_length, 77, 512):
            known.append(stage.name)
            if stage.name in stages:
                start = time.perf_counter()
                spec = write(stage, fmt, folder, holes=holes)
                took = time.perf_counter() - start
                print(f"{stage.name}, {fmt}: {took:.0f} s to the graph", file=sys.stderr)
                yield spec
        for name in stages:
            if name not in known:
                raise RecipeError(
                    f"there is no stage {name!r}{serialization.nearest(name, known)}",
                    hint="the stages are " + ", ".join(known),
                )


def write(
    stage: Stage,
    fmt: str,
    folder: Path,
    *,
    holes: bool,
    statistics: Statistics | None = None,
) -> EngineSpec:
    """Write one stage's graph.

    Args:
        statistics: of a calibration; None: the scales of quantized layers are made up.
    """
    from export import graph, precision
    from export.compile import mixed_precision

    path = folder / f"{stage.name}-{fmt}.onnx"
    layers = {fmt: _quantize(stage, fmt, statistics)} if FORMATS[fmt].quantized else {}
    traced = graph.to_graph(stage)
    if holes:
        mixed_precision.convert(traced, stage.definition, HALF.dtype)
        bound.bind(traced)
        ir.save(traced, path)
    else:
        precision.store(traced, HALF.name if layers else fmt)
        graph.save(traced, path)
    asked = Precision(fmt, fmt if layers else "", "", layers)
    return dataclasses.replace(stage.outline(asked), graph=path.name)


def _quantize(stage: Stage, fmt: str, statistics: Statistics | None) -> int:
    """Quantize the layers that a build would quantize, and return how many they are."""
    from export.quantize import apply, policy
    from export.quantize.apply import Decision
    from export.quantize.formats import activation_scale
    from export.quantize.scales import Scales

    scales = Scales(activation_scale(LARGEST_INPUT, fmt))
    choices = policy.choose([stage], fmt, HALF.name, {}, {})
    if statistics is None:
        decisions = [Decision(c, c.fmt, c.reason, scales if c.quantized else None) for c in choices]
    else:
        decisions = apply.decide({stage.name: stage}, choices, statistics, HALF.name, "mse")
    apply.replace({stage.name: stage}, decisions)
    return sum(decision.scales is not None for decision in decisions)


def inputs(spec: EngineSpec, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
    """Random inputs; whole numbers are zero, which is a valid step and index."""
    numbers = np.random.default_rng(0)
    made = {}
    for tensor in spec.inputs:
        shape = shape_at(tensor.shape, sizes)
        values = numbers.normal(size=shape) if tensor.dtype == "float32" else np.zeros(shape)
        made[tensor.name] = values.astype(tensor.dtype)
    if "text_length" in made:
        made["text_length"][:] = sizes[TEXT_TOKENS]
    return made
