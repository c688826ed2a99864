"""Steps of the two loops at the widths of the 7B model and FLUX.1-dev, on this machine's CPU.

    python -m benchmarks.cpu [--layers N] [--precision int8] [--json benchmarks/results/cpu.json]

One call of a stage, random weights, cut to `--layers`: a precision on each backend, over float32 on
onnxruntime. Before each stage comes its largest linear layer, alone: no graph of linear layers
gains more than they do, and what they gain is decided by this processor's instructions. All engines
are open in one process and take turns, to and fro, each after a moment of nothing; the median
counts. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, truncated_models
from benchmarks.arguments import count, new_file
from benchmarks.interleaving import to_and_fro
from bifrost_rt import backends, command, dims
from bifrost_rt.backends.base import output_shape
from bifrost_rt.errors import BifrostError
from bifrost_rt.manifest import EngineSpec, Range, TensorSpec
from export import flops
from export.compile import graphs
from export.formats import FORMATS
from export.synthetic.shapes import PRESETS

# one image, the release's steps; the prompt is the longest of the model
STEPS = 256
# The last of visual_decode computes what a step reveals, and less than the others. Of denoise it is
# one block of each kind in both networks, 4 GB in float32.
LAYERS = {"visual_decode": 3}
BACKENDS = ("onnxruntime", "openvino", "openvino-bf16")
BASE = ("fp32", "onnxruntime")
COLUMNS = ("engine", "precision", "backend", "ms", "10^12 op/s", "over fp32 on onnxruntime")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__)
    add = parser.add_argument
    add("--like", choices=PRESETS, default="7b", help="whose widths; default: 7b")
    add(
        "--layers", type=count, help="of every network; default: 3 for visual_decode, 1 for denoise"
    )
    add("--stages", default="visual_decode,denoise", help="comma between")
    add("--precision", choices=tuple(FORMATS), default="int8", help="beside fp32; default: int8")
    add("--rounds", type=count, default=5, help="timed calls each; default: 5")
    add("--json", type=new_file, metavar="FILE", help="write the record")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")  # diffusers constructs its own deprecated class
    forms = tuple(dict.fromkeys((BASE[0], options.precision)))
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    rows = []
    for stage in options.stages.split(","):
        layers = options.layers or LAYERS.get(stage, 1)
        shapes = PRESETS[options.like].cut(layers)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            specs = list(truncated_models.written(folder, [stage], shapes, forms))
            sizes = dims.of_run(text_tokens=shapes.max_seq_length, steps=STEPS)
            largest = largest_product(folder / specs[0].graph, stage, sizes)
            layer = [] if largest is None else [product(folder, *largest, forms)]
            for engines in (*layer, specs):
                for row in measure(folder, engines, sizes, options.rounds):
                    print(line(row), flush=True)
                    rows.append({"stage": stage, "layers": layers, "sizes": sizes, **row})
    if options.json:
        about = {"like": options.like, "rounds": options.rounds}
        record = {"machine": machine.describe(), **about, "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def product(
    folder: Path, rows: int, width: int, out: int, forms: Sequence[str]
) -> list[EngineSpec]:
    """Return a linear layer as an engine of its own, in every form."""
    import torch
    from torch import nn

    from export.stages import Definition, Stage

    made = []
    for fmt in forms:
        torch.manual_seed(0)
        doors = (TensorSpec("x", "float32", (rows, width)), TensorSpec("y", "float32", (rows, out)))
        layer = nn.Sequential(nn.Linear(width, out, bias=False)).requires_grad_(False)
        stage = Stage(Definition("product", 1e-4), layer, doors[:1], doors[1:])
        found = truncated_models.write(stage, fmt, folder, holes=False)
        made.append(dataclasses.replace(found, name=f"{rows}x{width} by {width}x{out}"))
    return made


def largest_product(
    path: Path, stage: str, sizes: Mapping[str, int]
) -> tuple[int, int, int] | None:
    """Rows, inputs and outputs of the linear layer that computes most; None where there is none."""
    found = []
    for node in graphs.read(path, stage).graph:
        if node.op_type == "MatMul":
            left, right = (flops.shape_of(value, sizes) for value in node.inputs)
            if len(right) == 2:
                found.append((math.prod(left[:-1]), *right))
    return max(found, key=math.prod, default=None)


def measure(
    folder: Path, specs: Sequence[EngineSpec], sizes: Mapping[str, int], rounds: int
) -> Iterator[dict[str, Any]]:
    """One row for every form and backend; the first is float32 on onnxruntime."""
    work = flops.count(graphs.read(folder / specs[0].graph, specs[0].name), sizes)
    rows, calls = [], []
    for spec in specs:
        for backend in BACKENDS:
            fmt = spec.precision.requested
            row = {"engine": spec.name, "precision": fmt, "backend": backend}
            try:
                calls.append(opened(folder, spec, sizes, backend))
                rows.append(row)
            except BifrostError as error:
                if (fmt, backend) == BASE:
                    raise
                yield {**row, "failed": error.message}
    times = turns(calls, rounds)
    for row, seconds in zip(rows, times, strict=True):
        middle = float(np.median(seconds))
        yield {
            **row,
            "ms": [1e3 * s for s in sorted(seconds)],
            "median_ms": 1e3 * middle,
            "tflops": work / middle / 1e12,
            "over_fp32": float(np.median(times[0])) / middle,
        }


def opened(
    folder: Path, spec: EngineSpec, sizes: Mapping[str, int], name: str
) -> Callable[[], None]:
    """Return a call of an engine on random inputs, made once.

    Raises:
        BackendError: the backend is not installed, or refuses the graph.
    """
    backend = backends.load(name)
    engine = backend.open(folder, spec, {symbol: Range(1, n) for symbol, n in sizes.items()})
    given = {
        key: backend.upload(value) for key, value in truncated_models.inputs(spec, sizes).items()
    }
    results = {t.name: backend.empty(output_shape(t, sizes), t.dtype) for t in spec.outputs}
    call = engine.bind(given, results)
    call()
    return call


def turns(calls: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each call, taken in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for i in range(rounds):
        for call, seconds in to_and_fro(list(zip(calls, times, strict=True)), i):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return times


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    about = [row["engine"], row["precision"], row["backend"]]
    if "failed" in row:
        return "| " + " | ".join([*about, "–", "–", row["failed"]]) + " |"
    figures = [f"{row['median_ms']:.1f}", f"{row['tflops']:.3f}", f"{row['over_fp32']:.2f}"]
    return "| " + " | ".join([*about, *figures]) + " |"


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
