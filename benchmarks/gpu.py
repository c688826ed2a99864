"""Steps of the two loops at the widths of the 7B model and FLUX.1-dev, on this machine's GPU.

    python -m benchmarks.gpu [--layers 2] [--json benchmarks/results/gpu.json]

Random weights, cut to `--layers`, in 8 bit on scales that are made up. Each row is an engine on a
driver, in a precision, with its weights in the engine or outside, with CUDA graphs or without:
milliseconds a step, the host's own share of it, and the part of the card's peak rate that this is,
where `export.planning.devices` knows the card. What a backend cannot do here stands in its row as
the reason. The record carries the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine, truncated_models
from benchmarks.arguments import count, new_file
from bifrost_rt import backends, command, dims
from bifrost_rt.backends import gpu
from bifrost_rt.backends.base import Backend, Engine
from bifrost_rt.engines import Loop
from bifrost_rt.errors import BifrostError
from bifrost_rt.manifest import Compiled, EngineSpec
from export import flops
from export.compile import bound, capabilities, graphs
from export.compile import builder as builders
from export.compile.options import COMPUTE
from export.compile.profiles import Sizes
from export.compile.rewriting import rewrite
from export.formats import FORMATS, HALF
from export.planning import devices
from export.stages.catalog import DEFINITIONS
from export.synthetic.shapes import PRESETS

# one image, its longest prompt, the release's steps: what is timed
SIZES = dims.of_run(text_tokens=300, steps=256)
# What engines are compiled for: the profile of the product, with guidance and with steps that
# reveal more than one token. For one size alone the builder makes other kernels.
LARGEST = dims.of_run(text_tokens=300, steps=256, guided=True, revealed=256, **dims.ANSWERS)
PROFILE = Sizes({name: (1, high) for name, high in LARGEST.items()})
# what of the table's rates an engine's products are held to
RATES = {declared.name: declared.rate for declared in FORMATS.values()}
FORMS = ("bf16", "int8", "fp8")  # of the graphs; the first is also compiled to float32
# (driver, what products compute in, where the weights are, whether steps are CUDA graphs)
CASES = (
    ("onnxruntime-cuda", "fp32", "baked", False),
    ("onnxruntime-cuda", "fp32", "baked", True),
    *(
        (backend, compute, weights, replayed)
        for backend in ("tensorrt-rtx", "tensorrt")
        for compute, weights, replayed in (
            ("fp32", "baked", True),
            ("bf16", "baked", False),
            ("bf16", "baked", True),
            ("bf16", "bound", True),
            ("int8", "baked", True),
            ("int8", "bound", True),
            ("fp8", "baked", True),
            ("fp8", "bound", True),
        )
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--like", choices=PRESETS, default="7b", help="whose widths; default: 7b")
    parser.add_argument("--layers", type=count, default=2, help="of every network; default: 2")
    parser.add_argument("--stages", default="visual_decode,denoise", help="comma between")
    parser.add_argument("--steps", type=count, default=50, help="timed steps; default: 50")
    parser.add_argument("--json", type=new_file, help="write the record")
    options = parser.parse_args(arguments)
    here = gpu.find()
    if isinstance(here, str):
        print(f"no GPU: {here}")
        return 1
    rows: list[dict[str, Any]] = []
    shapes = PRESETS[options.like].cut(options.layers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stages = options.stages.split(",")
        # graphs that nothing here runs are not written: each takes gigabytes and a minute
        rows += [row for stage in stages for row in unavailable(stage)]
        for row in rows:
            print(json.dumps(row), flush=True)
        for spec in truncated_models.written(folder, stages, shapes, forms()):
            for row in measure(folder, spec, here, options.steps):
                print(json.dumps(row), flush=True)
                rows.append(row)
    if options.json:
        about = {"like": options.like, "layers": options.layers}
        record = {"machine": machine.describe(), **about, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def forms() -> tuple[str, ...]:
    """Return the forms of the graphs that some backend runs here."""
    return tuple(
        fmt
        for fmt in FORMS
        if any(
            truncated_models.stored_as(compute) == fmt
            and backends.BACKENDS[name].unavailable() is None
            for name, compute, _, _ in CASES
        )
    )


def unavailable(stage: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one stage in the other forms."""
    for name, compute, weights, replayed in CASES:
        if truncated_models.stored_as(compute) not in forms():
            row = {"stage": stage, "backend": name, "compute": compute, "weights": weights}
            reason = backends.BACKENDS[name].unavailable()
            yield {**row, "cuda_graphs": replayed, "unavailable": reason}


def measure(folder: Path, spec: EngineSpec, here: gpu.Gpu, steps: int) -> Iterator[dict[str, Any]]:
    """One row for every case of one graph."""
    fmt = spec.precision.requested
    work = flops.count(graphs.read(folder / spec.graph, spec.name), SIZES)
    for name, compute, weights, replayed in CASES:
        if truncated_models.stored_as(compute) != fmt:
            continue
        row: dict[str, Any] = {"stage": spec.name, "backend": name, "compute": compute}
        row |= {"weights": weights, "cuda_graphs": replayed}
        if reason := backends.BACKENDS[name].unavailable():
            yield {**row, "unavailable": reason}
            continue
        try:
            backend: Any = backends.load(name)
            backend.graphs = replayed
            ready = spec
            if backends.BACKENDS[name].compiled:
                ready = compiled(folder, spec, name, compute, weights, here.architecture)
            engine = backend.open(folder, ready, PROFILE.ranges())
            found = time_steps(backend, engine, steps)
            engine.close()
        except BifrostError as error:
            yield {**row, "failed": error.message}
            continue
        seconds = found["step_ms"] / 1e3
        row |= found | {"tflops": round(work / seconds / 1e12, 1)}
        if (peak := peak_rate(here.name, compute)) is not None:
            row["of_peak"] = round(work / seconds / 1e12 / peak, 3)
        if reason := getattr(backend, "eager", {}).get(spec.name):
            row["eager_because"] = reason
        yield row


def compiled(
    folder: Path, spec: EngineSpec, name: str, compute: str, weights: str, architecture: str
) -> EngineSpec:
    """Compile a stage for one architecture into `folder`.

    Raises:
        CompileError: it lacks the arithmetic, or the builder refuses.
    """
    builder = builders.find(name)
    dtype = COMPUTE.get(compute, HALF.dtype)
    capabilities.check(name, [architecture], {compute, dtype})
    model = graphs.read(folder / spec.graph, spec.name)
    rewrite(model, DEFINITIONS[spec.name], dtype)
    outside = bound.bind(model) if weights == "bound" else []
    names = {str(tensor.name) for tensor in outside}
    built = builders.compile_graph(builder, model, spec, PROFILE, (architecture,), names)
    (folder / f"{spec.name}.engine").write_bytes(built.engine)
    stored = bound.store(outside, folder / f"{spec.name}.weights") if outside else ()
    about = Compiled(name, builder.version, (architecture,), built.flags, "", stored)
    return dataclasses.replace(spec, graph=f"{spec.name}.engine", compiled=about)


def time_steps(backend: Backend, engine: Engine, steps: int) -> dict[str, float]:
    """Milliseconds of a step, and those in which the host was busy with it, after ten steps that
    are not counted."""
    timings: dict[str, float] = {}
    given = {
        name: backend.upload(v) for name, v in truncated_models.inputs(engine.spec, SIZES).items()
    }
    loop = Loop(backend, engine, given, timings)
    for _ in range(10):
        loop.step()
    backend.wait()
    start = time.perf_counter()
    for _ in range(steps):
        loop.step()
    queued = time.perf_counter() - start
    backend.wait()
    whole = time.perf_counter() - start
    return {
        "step_ms": round(1e3 * whole / steps, 4),
        "host_ms": round(1e3 * queued / steps, 4),
    }


def peak_rate(card: str, compute: str) -> float | None:
    """Return the card's 10^12 operations a second in a precision, or None where it is not known."""
    device = devices.of_machine(card)
    return None if device is None else device.value(RATES[compute])


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
