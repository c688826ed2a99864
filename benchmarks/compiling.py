"""What compiling takes at the widths of the 7B model and FLUX.1-dev: seconds, memory, engine sizes.

    python -m benchmarks.compiling [--stages visual_decode,denoise] [--layers 1]
        [--compute fp32,bf16,int8,fp8] [--whole]

A checkpoint of the true widths, cut to `--layers`, with random weights, is written and its stages
are compiled, with their weights in the engine and outside, each in a process of its own, so that
its peak is the builder's. int8 and fp8 are what `export.build` makes of the same layers, on scales
that are made up, because sizes do not depend on them; the rest is bfloat16. With `--whole` nothing
is cut and nothing is stored: the weights are holes, and the engines are compiled without them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, truncated_models
from benchmarks.arguments import count
from benchmarks.residency import status
from bifrost_rt import command, dims, serialization
from bifrost_rt.manifest import EngineSpec, Precision, TensorSpec
from export.compile import bound, graphs
from export.compile import builder as builders
from export.compile.builder import Built
from export.compile.capabilities import ARCHITECTURES
from export.compile.options import COMPUTE as COMPUTES_IN
from export.compile.profiles import Sizes
from export.compile.rewriting import rewrite
from export.formats import HALF
from export.stages.catalog import DEFINITIONS

MODULE = "benchmarks.compiling"
TARGETS = ("sm86", "sm89", "sm120")
# one image of the release, with guidance
LARGEST = dims.of_run(text_tokens=300, steps=256, guided=True, revealed=256, **dims.ANSWERS)
SIZES = Sizes({name: (1, high) for name, high in LARGEST.items()})
# (what products compute in, where the weights are)
CASES = (
    *(("fp32", "baked"), ("bf16", "baked"), ("bf16", "bound")),
    *(("int8", "baked"), ("int8", "bound"), ("fp8", "baked"), ("fp8", "bound")),
)
COMPUTE = tuple(dict.fromkeys(compute for compute, _ in CASES))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiling", description=__doc__)
    parser.add_argument("--stages", default="visual_decode,denoise", help="comma between")
    parser.add_argument("--layers", type=count, default=1, help="of every network; default: 1")
    parser.add_argument("--compute", default=",".join(COMPUTE), help="comma between; default: all")
    parser.add_argument("--whole", action="store_true", help="all layers, without their weights")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(compile_one(options.one)))
        return 0
    print(json.dumps(machine.describe()["libraries"]))
    with tempfile.TemporaryDirectory() as temporary:
        stages, layers = options.stages.split(","), None if options.whole else options.layers
        compute = [HALF.name] if options.whole else options.compute.split(",")
        if unknown := set(compute) - set(COMPUTE):
            parser.error(
                f"--compute: {', '.join(sorted(unknown))} is not among {', '.join(COMPUTE)}"
            )
        for row in measure(Path(temporary), stages, layers, compute):
            print("| " + " | ".join(str(cell) for cell in row.values()) + " |", flush=True)
    return 0


def measure(
    folder: Path, stages: list[str], layers: int | None, compute: Sequence[str] = COMPUTE
) -> Iterator[dict[str, Any]]:
    """One row for every stage and case; `layers` None is the whole model without weights."""
    from export.synthetic.shapes import PRESETS  # brings torch, which is not the builder's memory

    cases = [(c, w) for c, w in CASES if c in compute and (layers is not None or w == "bound")]
    forms = tuple(dict.fromkeys(truncated_models.stored_as(computed) for computed, _ in cases))
    shapes = PRESETS["7b"] if layers is None else PRESETS["7b"].cut(layers)
    for spec in truncated_models.written(folder, stages, shapes, forms, holes=layers is None):
        for computed, weights in cases:
            if truncated_models.stored_as(computed) == spec.precision.requested:
                found = in_a_process(folder, spec, computed, weights)
                yield {"stage": spec.name, "compute": computed, "weights": weights, **found}


def in_a_process(
    folder: Path, spec: EngineSpec, compute: str, weights: str, module: str = MODULE, **more: Any
) -> Any:
    """Compile in a process of a benchmark's module; the child reads its task from a file.

    Args:
        more: of the task.
    """
    doors = [[dataclasses.asdict(t) for t in side] for side in (spec.inputs, spec.outputs)]
    task = folder / "task.json"
    graph = str(folder / spec.graph)
    names = {"name": spec.name, "graph": graph, "compute": compute, "weights": weights, **more}
    task.write_text(json.dumps({**names, "doors": doors}))
    command = [sys.executable, "-m", module, "--one", str(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def compiled(task: Mapping[str, Any], targets: Sequence[str]) -> tuple[Built, EngineSpec, set[str]]:
    """Compile a task's graph: the engine, its inputs and outputs, and which inputs are weights."""
    inputs, outputs = (
        tuple(serialization.load(TensorSpec, tensor) for tensor in side) for side in task["doors"]
    )
    spec = EngineSpec(task["name"], "", (), inputs, outputs, (), Precision("", "", ""))
    builder = builders.find("tensorrt-rtx")
    graph = graphs.read(Path(task["graph"]), spec.name)
    doors = {tensor.name for tensor in inputs}
    names = {str(value.name) for value in graph.graph.inputs} - doors
    if not names:
        rewrite(graph, DEFINITIONS[spec.name], COMPUTES_IN.get(task["compute"], HALF.dtype))
        if task["weights"] == "bound":
            names = {str(tensor.name) for tensor in bound.bind(graph)}
    return builders.compile_graph(builder, graph, spec, SIZES, targets, names), spec, names


def compile_one(path: Path) -> dict[str, Any]:
    """Of a task: what most products compute in as read back, MB of weights and of the engine,
    seconds, and the highest resident MB."""
    task = json.loads(path.read_text())
    start = time.perf_counter()
    targets = [name for name in TARGETS if task["compute"] in ARCHITECTURES[name].precisions]
    built, _, _ = compiled(task, targets)
    return {
        "computes_in": built.arithmetic.compute,
        "weights_mb": round(sum(built.arithmetic.weights.values()) / 1e6),
        "engine_mb": round(built.engine.nbytes / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": round(status()[1] / 1e6),
    }


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
