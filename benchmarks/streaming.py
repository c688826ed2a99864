"""Memory that building an engine takes, at the true width: the visual branch, streamed.

    python -m benchmarks.streaming --like 7b --layers 6 --precision bf16 --work DIR

A random checkpoint of the published shapes, cut in depth, is written to DIR (only the visual branch
has values; the rest is an outline). A process of its own then builds the engine as `export.build`
does (traced on the meta device, weights read, cast and written one by one), and compares it with
torch on one call at the full width: torch layer by layer, the engine in pieces. Beside it this
process reads `RssAnon`, what the other holds that is not a mapped file, every 5 ms.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.arguments import count, new_file
from bifrost_rt import command
from export.formats import FORMATS, HALF
from export.synthetic.shapes import PRESETS

TEXT_TOKENS = 12
PERIOD = 0.005  # seconds
LIMIT = 400 << 20  # bytes of weights in one piece


def prepare(work: Path, like: str, layers: int) -> Path:
    """Return the checkpoint, unless it is there."""
    from export.synthesize import synthesize
    from export.synthetic import networks, shards

    folder = work / f"{like}-{layers}"
    if folder.exists():
        return folder
    shapes = PRESETS[like].cut(layers)
    # the text branch is the base model's then, and nothing of the bifrost folder but what is read
    layout = dataclasses.replace(shapes.layout, left_out=("",))
    shapes = dataclasses.replace(shapes, layout=layout)
    outline = work / f".{folder.name}.partial"
    synthesize(shapes, outline, seed=None)
    stem, tensors, _ = networks.NETWORKS["bifrost"]
    for file in (outline / "bifrost").glob(f"{stem}*.safetensors"):
        file.unlink()
    shards.write(
        outline / "bifrost", stem, tensors(shapes), layout.dtype, layout.shard_bytes, seed=0
    )
    outline.rename(folder)
    return folder


def build(folder: Path, output: Path, precision: str) -> None:
    """Trace, store and compare; a line of JSON after each part."""
    import numpy as np
    import torch

    from export import graph
    from export import precision as precisions
    from export.checkpoint import Checkpoint
    from export.graph_partitions import PartitionedEngine
    from export.model.decoding import VisualDecode
    from export.parity import rounding
    from export.stages import visual_decode
    from export.weight_offloading import largest, streamed

    def done(part: str, **facts: Any) -> None:
        print(json.dumps({"part": part, **facts}), flush=True)

    done("imports")
    checkpoint = Checkpoint(*(folder / n for n in ("mllm", "bifrost", "flux")), read=False)
    stage = visual_decode.stage(VisualDecode(checkpoint.visual_branch()), checkpoint.decoder)
    inputs = _inputs(stage)
    if not FORMATS[precision].quantized:
        fallback, layers = precision, {}
        precisions.round_weights(stage.module, precision)
    else:
        fallback = HALF.name
        layers = _quantize(stage, precision, fallback, inputs, done)
    traced = graph.to_graph(stage)
    precisions.store(traced, fallback)
    done("trace", largest_bytes=largest(stage.module))
    files, _ = graph.save(traced, output / "visual_decode.onnx")
    del traced
    done("write", file_bytes=sum(file.stat().st_size for file in files))
    with torch.inference_mode(), streamed(stage.module, 0):
        expected = stage.module(*(torch.from_numpy(inputs[t.name]) for t in stage.inputs))
    done("torch, layer by layer")
    facts = _spec(stage, files)
    engine = PartitionedEngine(output, facts, _ranges(), limit=LIMIT)
    outputs = {
        t.name: np.empty(tuple(e.shape), t.dtype)
        for t, e in zip(stage.outputs, expected, strict=True)
    }
    engine.bind(inputs, outputs)()
    wanted, found = expected[0].numpy(), outputs["next_tokens"]
    done(
        "engine, in pieces",
        partitions=len(engine.partitions),
        values=int(wanted.size),
        max_error=float(np.abs(wanted - found).max()),
        largest_value=float(np.abs(wanted).max()),
        relative_error=float(np.linalg.norm(wanted - found) / np.linalg.norm(wanted)),
        tolerance=rounding(layers) or stage.tolerance,
    )


def _inputs(stage: Any) -> dict[str, Any]:
    """One image at a short prompt, with random values."""
    import numpy as np

    from bifrost_rt import dims, schedules

    sizes = dims.of_run(text_tokens=TEXT_TOKENS, steps=2, revealed=256)
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for spec in stage.inputs:
        shape = dims.shape_at(spec.shape, sizes)
        found[spec.name] = {
            "float32": rng.standard_normal(shape).astype(np.float32),
            "bool": np.ones(shape, bool),
            "int64": np.zeros(shape, np.int64),
        }[spec.dtype]
    found["text_length"][:] = TEXT_TOKENS
    every = np.ones((sizes[dims.STEPS], 1, sizes[dims.REVEALED]), bool)
    found["reveal_places"], found["token_sources"] = schedules.reveal_rows(every)
    return found


def _quantize(
    stage: Any, fmt: str, fallback: str, inputs: dict[str, Any], done: Any
) -> dict[str, int]:
    """As `export.quantize.quantize` does, with the statistics of one call. Returns the number of
    layers by format."""
    import torch

    from export.precision import round_weights
    from export.quantize import apply, calibrate, policy
    from export.quantize.statistics import Statistics
    from export.weight_offloading import streamed

    statistics = Statistics("", ())
    with (
        torch.inference_mode(),
        streamed(stage.module, 0),
        calibrate.watching([stage], statistics.layers),
    ):
        stage.module(*(torch.from_numpy(inputs[t.name]) for t in stage.inputs))
    done("statistics")
    choices = policy.choose([stage], fmt, fallback, {}, {})
    decisions = apply.decide({stage.name: stage}, choices, statistics, fallback, "mse")
    apply.replace({stage.name: stage}, decisions)
    others = {d.choice.path: d.given for d in decisions if d.scales is None}
    round_weights(stage.module, fallback, others)
    given = [d.given for d in decisions]
    layers = {fmt: given.count(fmt) for fmt in sorted(set(given))}
    done("scales", layers=layers)
    return layers


def _spec(stage: Any, files: list[Path]) -> Any:
    import dataclasses

    from bifrost_rt.manifest import Precision

    spec = stage.outline(Precision("", "", "float32"))
    return dataclasses.replace(spec, graph=files[0].name, files=tuple(file.name for file in files))


def _ranges() -> Any:
    from bifrost_rt import dims

    return dims.ranges(mllm_max_length=300, num_visual_tokens=256)


def measure(folder: Path, output: Path, precision: str) -> dict[str, Any]:
    """Run `build` in a process of its own and follow its memory, part by part."""
    output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.streaming", "--child", str(folder), str(output)]
    process = subprocess.Popen(
        [*command, "--precision", precision], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    import os

    os.set_blocking(process.stdout.fileno(), False)
    parts: list[dict[str, Any]] = []
    peak, start = 0, time.perf_counter()
    while True:
        peak = max(peak, _anonymous(process.pid))
        for line in iter(process.stdout.readline, ""):
            now = time.perf_counter()
            parts.append({**json.loads(line), "seconds": round(now - start, 2), "peak": peak})
            peak, start = 0, now
        if process.poll() is not None:
            break
        time.sleep(PERIOD)
    if process.returncode:
        raise SystemExit(f"the build failed with {process.returncode}")
    return {
        "machine": machine.describe(),
        "checkpoint": folder.name,
        "precision": precision,
        "parts": parts,
        "peak_anonymous_bytes": max(part["peak"] for part in parts),
    }


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    parser.add_argument("--like", choices=PRESETS, default="7b")
    parser.add_argument("--layers", type=count, default=6)
    parser.add_argument("--precision", choices=tuple(FORMATS), default=HALF.name)
    parser.add_argument("--work", type=Path, help="for the checkpoint and the engine")
    parser.add_argument("--json", type=new_file, help="write the record")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        checkpoint, output = options.child
        build(checkpoint, output, options.precision)
        return 0
    if options.work is None:
        parser.error("--work DIR")
    folder = prepare(options.work, options.like, options.layers)
    record = measure(folder, options.work / f"{folder.name}-{options.precision}", options.precision)
    text = json.dumps(record, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(command.run(main, debug=False))
