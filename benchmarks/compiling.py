"""What compiling takes at the widths of the 7B model and FLUX.1-dev: seconds, memory, engine sizes.

    python -m benchmarks.compiling [--stages visual_decode,denoise] [--layers 1] [--whole]

A checkpoint of the true widths, cut to `--layers`, with random weights, is written and its stages
are compiled in float32 and in bfloat16, with their weights in the engine and outside, each in a
process of its own, so that its peak is the builder's. With `--whole` nothing is cut and nothing is
stored: the weights are holes, and the engines are compiled without them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir

from benchmarks import machine
from benchmarks.residency import status
from bifrost_rt import strict
from bifrost_rt.manifest import EngineSpec, Precision, TensorSpec
from export.compile import bound, graphs, half
from export.compile import builder as builders
from export.compile.profiles import Sizes

TARGETS = ("sm86", "sm89", "sm120")
# one picture of the release, with guidance
BOUNDS = {
    **dict.fromkeys(("images", "prompts"), (1, 1)),
    **dict.fromkeys(("texts", "branches"), (1, 2)),
    "text_tokens": (1, 300),
    "steps": (1, 256),
    "revealed": (1, 256),
}
CASES = (("fp32", "baked"), ("bf16", "baked"), ("bf16", "bound"))


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiling", description=__doc__)
    parser.add_argument("--stages", default="visual_decode,denoise", help="comma between")
    parser.add_argument("--layers", type=int, default=1, help="of every network; default: 1")
    parser.add_argument("--whole", action="store_true", help="all layers, without their weights")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(compile_one(options.one)))
        return 0
    print(json.dumps(machine.describe()["libraries"]))
    with tempfile.TemporaryDirectory() as temporary:
        stages = options.stages.split(",")
        for row in measure(Path(temporary), stages, None if options.whole else options.layers):
            print("| " + " | ".join(str(cell) for cell in row.values()) + " |", flush=True)
    return 0


def measure(folder: Path, stages: list[str], layers: int | None) -> Iterator[dict[str, Any]]:
    """One row for every stage and case; `layers` None is the whole model without weights."""
    for spec, graph in written(folder, stages, layers):
        for compute, weights in CASES if layers else CASES[-1:]:
            found = in_a_process(folder, spec, graph, compute, weights)
            yield {"stage": spec.name, "compute": compute, "weights": weights, **found}


def written(
    folder: Path, stages: list[str], layers: int | None
) -> Iterator[tuple[EngineSpec, Path]]:
    """The stages' graphs as files: of random bfloat16 weights, or of holes."""
    from export import assemble, graph, precision
    from export.checkpoint import Checkpoint
    from export.synthesize import synthesize
    from export.synthetic.shapes import PRESETS

    shapes = PRESETS["7b"] if layers is None else PRESETS["7b"].cut(layers)
    parts = [folder / "checkpoint" / name for name in ("mllm", "bifrost", "flux")]
    synthesize(shapes, folder / "checkpoint", seed=None if layers is None else 0)
    checkpoint = Checkpoint(parts[0], parts[1], parts[2], read=False)
    facts = assemble.facts(checkpoint)
    for stage in assemble.stages(checkpoint, facts, checkpoint.max_seq_length, 77, 512):
        if stage.name not in stages:
            continue
        path = folder / f"{stage.name}.onnx"
        nothing = Precision("", "", "")
        spec = EngineSpec(
            stage.name, path.name, (), stage.inputs, stage.outputs, stage.carry, nothing
        )
        start = time.perf_counter()
        traced = graph.to_graph(stage)
        if layers is None:  # nothing is read: the graph is converted here and stays without weights
            half.convert(traced, stage.name, "bfloat16")
            bound.bind(traced)
            ir.save(traced, path)
        else:
            precision.store(traced, "bf16")
            graph.save(traced, path)
        print(f"{stage.name}: {time.perf_counter() - start:.0f} s to the graph", file=sys.stderr)
        yield spec, path


def in_a_process(
    folder: Path, spec: EngineSpec, graph: Path, compute: str, weights: str
) -> dict[str, Any]:
    """Compile; the child reads its task from a file."""
    doors = [[dataclasses.asdict(t) for t in side] for side in (spec.inputs, spec.outputs)]
    task = folder / "task.json"
    names = {"name": spec.name, "graph": str(graph), "compute": compute, "weights": weights}
    task.write_text(json.dumps({**names, "doors": doors}))
    command = [sys.executable, "-m", "benchmarks.compiling", "--one", str(task)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compile_one(path: Path) -> dict[str, Any]:
    """Of a task: MB of weights and of the engine, seconds, and the highest resident MB."""
    task = json.loads(path.read_text())
    inputs, outputs = (
        tuple(strict.load(TensorSpec, tensor) for tensor in side) for side in task["doors"]
    )
    spec = EngineSpec(task["name"], "", (), inputs, outputs, {}, Precision("", "", ""))
    builder = builders.find("tensorrt-rtx")
    graph = graphs.read(Path(task["graph"]), spec.name)
    doors = {tensor.name for tensor in inputs}
    names = {str(value.name) for value in graph.graph.inputs} - doors
    start = time.perf_counter()
    if not names:
        if task["compute"] == "bf16":
            half.convert(graph, spec.name, "bfloat16")
        if task["weights"] == "bound":
            names = {str(tensor.name) for tensor in bound.bind(graph)}
    built = builders.compile_graph(builder, graph, spec, Sizes(BOUNDS), TARGETS, names)
    return {
        "weights_mb": round(sum(built.arithmetic.weights.values()) / 1e6),
        "engine_mb": round(built.engine.nbytes / 1e6, 1),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mb": round(status()[1] / 1e6),
    }


if __name__ == "__main__":
    raise SystemExit(main())
