"""What 16 bit costs: every 16-bit graph beside its float32 graph, on the values of a real run.

The float32 graphs were compared with torch when the set was built, so they stand for it here.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from bifrost_rt import Generator, backends, pipeline, selftest
from bifrost_rt import manifest as manifests
from bifrost_rt.backends.base import Backend, output_shape, symbol_sizes
from bifrost_rt.manifest import Deviation, EngineSpec, Manifest
from export import parity
from export.compile import graphs, simulate
from export.compile.rewriting import rewrite
from export.engine_set import describe_files
from export.errors import CompileError, ParityError
from export.exercise import draw_look_answer
from export.formats import FULL, HALF
from export.stages import Definition, Stage
from export.stages.catalog import DEFINITIONS

MOST_PSNR = 100.0  # of images that are the same: JSON has no infinity


def measure(
    source: Path,
    manifest: Manifest,
    types: Mapping[str, str],
    definitions: Mapping[str, Definition] = DEFINITIONS,
    generate: pipeline.Generate = draw_look_answer,
) -> tuple[dict[str, dict[str, Any]], Deviation | None]:
    """Compare a set with itself in 16 bit.

    Args:
        types: stage -> "float32", "float16" or "bfloat16".
        definitions: of the set's engines, by name.
        generate: what runs the engines.

    Returns:
        Per stage in 16 bit: max_error, largest_value, tolerance, calls; as `parity.compare`. And
        how far the self-test's image is from the builder's, where `generate` is the product's.

    Raises:
        CompileError: a stage differs by more than its `half_tolerance` allows, or overflows.
    """
    backend = backends.load("onnxruntime")
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
            stages[spec.name] = _float32(source, manifest, spec, backend, held)
        try:
            found = parity.compare(folder, manifest, stages, backend, generate=generate)
        except ParityError as error:
            raise CompileError(
                f"in 16 bit, {error.message.replace('torch', 'its float32 graph')}",
                hint=f"compile with --compute {HALF.name}, whose range is that of {FULL.dtype}, "
                f"or --compute {FULL.name}",
            ) from error
        product = generate is draw_look_answer  # what a generator runs
        deviation = _image(source, folder, manifest, backend) if product else None
    return {n: record for n, record in found.items() if types[n] != "float32"}, deviation


def _image(source: Path, folder: Path, manifest: Manifest, backend: Backend) -> Deviation:
    """Return the self-test through the simulated engines of `folder`, against the set's own
    image."""
    engines = tuple(
        dataclasses.replace(spec, files=(spec.graph, f"{spec.name}.simulated"))
        for spec in manifest.engines
    )
    shutil.copyfile(source / selftest.IMAGE, folder / selftest.IMAGE)
    there = dataclasses.replace(manifest, engines=engines, files=describe_files(folder))
    (folder / manifests.FILENAME).write_bytes(there.dumps())
    with Generator(folder, backend=backend) as generator:
        found = selftest.deviation(selftest.draw(generator), selftest.expected(generator))
    return Deviation(min(found.psnr, MOST_PSNR), found.mean)


def simulated(
    source: Path, folder: Path, spec: EngineSpec, engine: Definition, compute: str
) -> None:
    """Write one engine's graph, as it computes in `compute`, for the CPU into `folder`."""
    model = graphs.read(source / spec.graph, spec.name)
    if compute != "float32":
        rewrite(model, engine, compute)
        simulate.simulate(model)
    ir.save(model, folder / spec.graph, external_data=f"{spec.name}.simulated")


def _float32(
    source: Path, manifest: Manifest, spec: EngineSpec, backend: Backend, held: Definition
) -> Stage:
    engine = backend.open(source, spec, manifest.dimensions)

    class Engine(nn.Module):
        """In the place of a stage's torch module."""

        def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
            inputs = {t.name: x.numpy() for t, x in zip(spec.inputs, given, strict=True)}
            sizes = symbol_sizes(spec, inputs)
            outputs = {t.name: backend.empty(output_shape(t, sizes), t.dtype) for t in spec.outputs}
            engine.bind(inputs, outputs)()
            return tuple(torch.from_numpy(outputs[t.name]) for t in spec.outputs)

    return Stage(held, Engine(), spec.inputs, spec.outputs, spec.state)
