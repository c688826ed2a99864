"""One decoder layer at the width of the 7B model through the real builder: minutes and gigabytes
are what the tiny models cannot show. Run with `pytest -m slow -s tests/export`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

# In a process of its own, so that its peak is the builder's and not the exporter's.
COMPILE = """
import json, sys, time
from pathlib import Path
from bifrost_rt.manifest import EngineSpec, Precision, TensorSpec
from bifrost_rt.strict import load
from export.compile import builder as builders
from export.compile.profiles import Sizes

path, specs, bounds, targets = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
inputs, outputs = (tuple(load(TensorSpec, t) for t in side) for side in specs)
spec = EngineSpec("visual_decode", path.name, (), inputs, outputs, {}, Precision("", "", ""))
builder = builders.find("tensorrt-rtx")
start = time.perf_counter()
sizes = Sizes({name: tuple(pair) for name, pair in bounds.items()})
engine, _ = builders.compile_graph(builder, path, spec, sizes, targets)
seconds = time.perf_counter() - start
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = int(status["VmHWM"].split()[0]) * 1024
print(json.dumps({"seconds": seconds, "bytes": engine.nbytes, "peak": peak}))
"""
BOUNDS = {"images": [1, 1], "branches": [1, 2], "text_tokens": [1, 300], "steps": [1, 256]}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_layer_of_the_7b_model_compiles(tmp_path: Path, precision: str) -> None:
    import dataclasses

    import torch

    from export import graph
    from export import precision as precisions
    from export.model.decoder import DecoderConfig
    from export.model.visual_branch import VisualBranch
    from export.stages import visual_decode

    config = DecoderConfig(3584, 18944, 1, 28, 4, 128, 152064, 1e-6, 1e6)
    torch.manual_seed(0)
    stage = visual_decode.stage(VisualBranch(config, 256), config)
    precisions.round_weights(stage.module, precision)
    traced = graph.to_graph(stage)
    precisions.store(traced, precision)
    files = graph.save(traced, tmp_path / "visual_decode.onnx")
    stored = sum(path.stat().st_size for path in files)
    specs = [[dataclasses.asdict(t) for t in side] for side in (stage.inputs, stage.outputs)]
    given = [json.dumps(value) for value in (specs, BOUNDS, ["sm86", "sm89", "sm120"])]
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(files[0]), *given],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ratio = found["peak"] / stored
    print(
        f"\n{precision}: graph {stored / 1e6:.0f} MB, engine {found['bytes'] / 1e6:.0f} MB, "
        f"{found['seconds']:.1f} s, peak {found['peak'] / 1e6:.0f} MB ({ratio:.2f} times the graph)"
    )
    assert found["bytes"] > 0.4 * stored
