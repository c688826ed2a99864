"""Steps of the two loops at the widths of the 7B model and FLUX.1-dev, on this machine's GPU.

    python -m benchmarks.gpu [--layers 2] [--json benchmarks/results/gpu.json]

Random weights, cut to `--layers`; each row is an engine on a driver, in a precision, with its
weights in the engine or outside, with CUDA graphs or without: milliseconds a step, the host's own
share of it, and the part of the card's peak rate that this is, where `engines/devices.toml` knows
the card. What a driver cannot do here stands in its row as the reason. The record carries the
machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import compiling, machine
from bifrost_rt import backends
from bifrost_rt.backends import gpu
from bifrost_rt.backends.base import Backend, Engine
from bifrost_rt.engines import Loop
from bifrost_rt.errors import BifrostError
from bifrost_rt.manifest import Compiled, EngineSpec, Range
from export import flops
from export.compile import bound, graphs, half
from export.compile import builder as builders
from export.compile.profiles import Sizes
from export.planning import devices

# one picture, its longest prompt, the release's steps
SIZES = {"images": 1, "branches": 1, "text_tokens": 300, "steps": 256, "revealed": 1}
RATES = {"fp32": "fp32", "fp16": "fp16", "bf16": "fp16"}
CASES = (
    ("onnxruntime-cuda", "fp32", "baked", False),
    ("onnxruntime-cuda", "fp32", "baked", True),
    *(
        (driver, compute, weights, replayed)
        for driver in ("tensorrt-rtx", "tensorrt")
        for compute, weights, replayed in (
            ("fp32", "baked", True),
            ("bf16", "baked", False),
            ("bf16", "baked", True),
            ("bf16", "bound", True),
        )
    ),
)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--layers", type=int, default=2, help="of every network; default: 2")
    parser.add_argument("--stages", default="visual_decode,denoise", help="comma between")
    parser.add_argument("--steps", type=int, default=50, help="timed steps; default: 50")
    parser.add_argument("--json", type=Path, help="write the record")
    options = parser.parse_args(arguments)
    here = gpu.find()
    if isinstance(here, str):
        print(f"no GPU: {here}")
        return 1
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for spec, graph in compiling.written(folder, options.stages.split(","), options.layers):
            for row in measure(folder, spec, graph, here, options.steps):
                print(json.dumps(row), flush=True)
                rows.append(row)
    if options.json:
        record = {"machine": machine.describe(), "layers": options.layers, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(
    folder: Path, spec: EngineSpec, graph: Path, here: gpu.Gpu, steps: int
) -> Iterator[dict[str, Any]]:
    """One row for every case."""
    work = flops.count(graphs.read(graph, spec.name), SIZES)
    for name, compute, weights, replayed in CASES:
        row: dict[str, Any] = {"stage": spec.name, "driver": name, "compute": compute}
        row |= {"weights": weights, "cuda_graphs": replayed}
        if reason := backends.DRIVERS[name].unavailable():
            yield {**row, "unavailable": reason}
            continue
        try:
            driver: Any = backends.load(name)
            driver.graphs = replayed
            ready = spec
            if backends.DRIVERS[name].compiled:
                ready = compiled(folder, spec, graph, name, compute, weights, here)
            ranges = {symbol: Range(1, high) for symbol, high in SIZES.items()}
            engine = driver.open(folder, ready, ranges)
            found = time_steps(driver, engine, steps)
            engine.close()
        except BifrostError as error:
            yield {**row, "failed": error.message}
            continue
        seconds = found["step_ms"] / 1e3
        row |= found | {"tflops": round(work / seconds / 1e12, 1)}
        if (peak := peak_rate(here.name, compute)) is not None:
            row["of_peak"] = round(work / seconds / 1e12 / peak, 3)
        if reason := getattr(driver, "eager", {}).get(spec.name):
            row["eager_because"] = reason
        yield row


def compiled(
    folder: Path,
    spec: EngineSpec,
    graph: Path,
    name: str,
    compute: str,
    weights: str,
    here: gpu.Gpu,
) -> EngineSpec:
    """Compile a stage for this GPU into `folder`."""
    builder = builders.find(name)
    model = graphs.read(graph, spec.name)
    if compute != "fp32":
        half.convert(model, spec.name, {"fp16": "float16", "bf16": "bfloat16"}[compute])
    outside = bound.bind(model) if weights == "bound" else []
    names = {str(tensor.name) for tensor in outside}
    bounds = Sizes({symbol: (1, high) for symbol, high in SIZES.items()})
    built = builders.compile_graph(builder, model, spec, bounds, (here.architecture,), names)
    (folder / f"{spec.name}.engine").write_bytes(built.engine)
    stored = bound.store(outside, folder / f"{spec.name}.weights") if outside else ()
    about = Compiled(name, builder.version, (here.architecture,), built.flags, "", stored)
    return dataclasses.replace(spec, graph=f"{spec.name}.engine", compiled=about)


def time_steps(driver: Backend, engine: Engine, steps: int) -> dict[str, float]:
    """Milliseconds of a step, and those in which the host was busy with it, after ten steps that
    are not counted."""
    timings: dict[str, float] = {}
    loop = Loop(driver, engine, example(driver, engine.spec, SIZES), timings)
    for _ in range(10):
        loop.step()
    driver.wait()
    start = time.perf_counter()
    for _ in range(steps):
        loop.step()
    queued = time.perf_counter() - start
    driver.wait()
    whole = time.perf_counter() - start
    return {
        "step_ms": round(1e3 * whole / steps, 4),
        "host_ms": round(1e3 * queued / steps, 4),
    }


def example(driver: Backend, spec: EngineSpec, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Random inputs; whole numbers are zero, which is a valid step, length and index."""
    numbers = np.random.default_rng(0)
    made = {}
    for tensor in spec.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in tensor.shape]
        values = numbers.normal(size=shape) if tensor.dtype == "float32" else np.zeros(shape)
        made[tensor.name] = driver.upload(values.astype(tensor.dtype))
    return made


def peak_rate(card: str, compute: str) -> float | None:
    """The card's 10^12 operations a second in a precision, or None where it is not known."""
    device = devices.of_machine(card)
    return None if device is None else device.value(RATES[compute])


if __name__ == "__main__":
    raise SystemExit(main())
