"""What 16 bit costs: every 16-bit graph beside its float32 graph, on the values of a real run.

The float32 graphs were compared with torch when the set was built, so they stand for it here.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bifrost_rt import backends, pipeline
from bifrost_rt.backends.base import Backend, output_shape, symbol_sizes
from bifrost_rt.manifest import EngineSpec, Manifest
from export import parity
from export.compile import graphs, half, simulate
from export.errors import CompileError, ParityError
from export.stages import Definition, Stage
from export.stages.catalog import DEFINITIONS


def measure(
    source: Path,
    manifest: Manifest,
    types: Mapping[str, str],
    definitions: Mapping[str, Definition] = DEFINITIONS,
    generate: pipeline.Generate = pipeline.generate,
) -> dict[str, dict[str, Any]]:
    """Compare a set with itself in 16 bit.

    Args:
        types: stage -> "float32", "float16" or "bfloat16".
        definitions: of the set's engines, by name.
        generate: what runs the engines.

    Returns:
        Per stage in 16 bit: max_error, largest_value, tolerance, calls; as `parity.compare`.

    Raises:
        CompileError: a stage differs by more than its `half_tolerance` allows, or overflows.
    """
    driver = backends.load("onnxruntime")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "simulated"
        folder.mkdir()
        for encoder in (manifest.text.mllm, manifest.text.clip, manifest.text.t5):
            (folder / encoder.tokenizer).parent.mkdir(parents=True, exist_ok=True)
            (folder / encoder.tokenizer).symlink_to((source / encoder.tokenizer).resolve())
        stages = {}
        for spec in manifest.engines:
            engine, compute = definitions[spec.name], types[spec.name]
            simulated(source, folder, spec, engine, compute)
            held = dataclasses.replace(engine, tolerance=engine.half_tolerance[compute])
            stages[spec.name] = _float32(source, manifest, spec, driver, held)
        try:
            found = parity.compare(folder, manifest, stages, driver, generate=generate)
        except ParityError as error:
            raise CompileError(
                f"in 16 bit, {error.message.replace('torch', 'its float32 graph')}",
                hint="compile with --compute bf16, whose range is that of float32, or --compute "
                "fp32",
            ) from error
    return {name: record for name, record in found.items() if types[name] != "float32"}


def simulated(
    source: Path, folder: Path, spec: EngineSpec, engine: Definition, compute: str
) -> None:
    """Write one engine's graph, as it computes in `compute`, for the CPU into `folder`."""
    model = graphs.read(source / spec.graph, spec.name)
    if compute != "float32":
        half.convert(model, engine, compute)
        simulate.simulate(model)
    ir.save(model, folder / spec.graph, external_data=f"{spec.name}.simulated")


def _float32(
    source: Path, manifest: Manifest, spec: EngineSpec, driver: Backend, held: Definition
) -> Stage:
    engine = driver.open(source, spec, manifest.dimensions)

    class Engine(nn.Module):
        """In the place of a stage's torch module."""

        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            inputs = {t.name: x.numpy() for t, x in zip(spec.inputs, given, strict=True)}
            sizes = symbol_sizes(spec, inputs)
            outputs = {t.name: driver.empty(output_shape(t, sizes), t.dtype) for t in spec.outputs}
            engine.bind(inputs, outputs)()
            return tuple(torch.from_numpy(outputs[t.name]) for t in spec.outputs)

    return Stage(held, Engine(), spec.inputs, spec.outputs, spec.carry)
