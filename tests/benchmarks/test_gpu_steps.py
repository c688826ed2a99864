"""The benchmarks of true widths: their own logic, on a backend that this machine has."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compiling, nvidia
from benchmarks import gpu as benchmark
from bifrost_rt import backends, dims, manifest
from bifrost_rt.backends import gpu
from bifrost_rt.backends.cuda_provider import CPU
from bifrost_rt.backends.onnxruntime_cuda import OnnxRuntimeCuda
from bifrost_rt.manifest import Defaults, EngineSpec, Range
from export.compile import bound, profiles


class OnTheHost(OnnxRuntimeCuda):
    """In place of TensorRT-RTX, which has no device here: computes the graph that an engine was
    compiled from."""

    def __init__(self) -> None:
        super().__init__(provider=CPU, device="cpu")
        self.opened: list[tuple[tuple[str, ...], int]] = []

    def open(self, folder: Path, spec: EngineSpec, dimensions: Any) -> Any:
        assert spec.compiled is not None
        assert (folder / spec.graph).stat().st_size > 0
        self.opened.append((spec.compiled.targets, len(spec.compiled.weights)))
        graph = f"{spec.name}-{spec.precision.requested}.onnx"
        return super().open(
            folder, dataclasses.replace(spec, graph=graph, compiled=None), dimensions
        )


def test_every_case_has_a_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All but the GPU is real: the graphs, and the engines that the builder makes of them."""
    stage, architecture = "visual_decode", "sm86"
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    pytest.importorskip("cuda.bindings", reason="tensorrt-rtx is not installed")
    backend = OnTheHost()
    monkeypatch.setattr(gpu, "find", lambda: gpu.Gpu("NVIDIA GeForce RTX 4090", architecture))
    monkeypatch.setattr(bound, "SMALLEST", 1 << 10)  # the networks are tiny
    monkeypatch.setattr(nvidia, "bus_id", lambda: None)
    monkeypatch.setattr(backends, "load", lambda name: backend)
    monkeypatch.setattr(benchmark, "SIZES", {**benchmark.SIZES, "text_tokens": 20})
    record = tmp_path / "gpu.json"
    arguments = ["--like", "tiny", "--layers", "1", "--steps", "2", "--json", str(record)]
    assert benchmark.main([*arguments, "--stages", stage]) == 0
    rows = json.loads(record.read_text())["rows"]
    keys = ("backend", "compute", "weights", "cuda_graphs")
    assert {row["stage"] for row in rows} == {stage}
    assert sorted(tuple(row[key] for key in keys) for row in rows) == sorted(benchmark.CASES)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == rows
    for row in rows:
        if row["backend"] != "tensorrt-rtx":
            assert "Provider" in row["unavailable"] or "not installed" in row["unavailable"]
        elif row["compute"] == "fp8":
            assert "has no fp8 arithmetic" in row["failed"]
        else:
            assert row["step_ms"] >= row["host_ms"] > 0
            assert 0 <= row["of_peak"] < 1
    assert {targets for targets, _ in backend.opened} == {(architecture,)}
    assert {bool(outside) for _, outside in backend.opened} == {True, False}


def test_the_builders_memory_is_measured_without_torch() -> None:
    code = "import sys, benchmarks.compiling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_steps_are_timed_on_any_driver(alpha_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SIZES", {**benchmark.SIZES, "text_tokens": 20})
    backend = OnnxRuntimeCuda(provider=CPU, device="cpu")
    for stage in ("visual_decode", "denoise"):
        ranges = {symbol: Range(1, high) for symbol, high in benchmark.SIZES.items()}
        engine = backend.open(alpha_set, manifest.read(alpha_set).engine(stage), ranges)
        found = benchmark.time_steps(backend, engine, 3)
        assert found["step_ms"] >= found["host_ms"] > 0


@pytest.mark.parametrize(
    ("card", "known"),
    [
        ("NVIDIA GeForce RTX 4090", True),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", False),
        ("NVIDIA H200", False),
    ],
)
def test_a_cards_peak_is_that_of_the_table(card: str, known: bool) -> None:
    assert (benchmark.peak_rate(card, "bf16") is not None) == known


def test_graphs_that_nothing_runs_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card with onnxruntime alone: its float32 case is written, and every other case has its row
    with the reason."""

    def reason(backend: backends.BackendInfo) -> str | None:
        return None if backend.extra == "cuda" else "not installed"

    monkeypatch.setattr(backends.BackendInfo, "unavailable", reason)
    assert benchmark.forms() == ("bf16",)
    rows = list(benchmark.unavailable("denoise"))
    assert {row["compute"] for row in rows} == {"int8", "fp8"}
    assert {row["unavailable"] for row in rows} == {"not installed"}
    assert len(rows) == sum(compute in ("int8", "fp8") for _, compute, _, _ in benchmark.CASES)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if not isinstance(gpu.find(), str):
        pytest.skip("this machine has one")
    assert benchmark.main([]) == 1
    assert capsys.readouterr().out.startswith("no GPU: ")


DEFAULTS = Defaults(256, 1.0, 28, 3.5, 0.7)  # the release's


def test_the_engines_that_are_timed_are_compiled_for_the_products_sizes() -> None:
    """For one size alone the builder makes other kernels, and moves a weight at every step."""
    assert benchmark.PROFILE == compiling.SIZES
    product = profiles.sizes(
        dims.ranges(
            **{"mllm_max_length": 300, "num_visual_tokens": 256},
            **{"chunk": dims.CHUNK, "context": dims.CONTEXT},
            **{"max_windows": 1, "max_vision_tokens": 1},  # no image is looked at
        ),
        DEFAULTS,
        1,
        None,
    )
    assert product == benchmark.PROFILE
    assert benchmark.PROFILE.bounds["revealed"] == (1, benchmark.SIZES["steps"])
    assert benchmark.PROFILE.bounds["branches"] == (1, 2)
    for symbol, size in benchmark.SIZES.items():
        low, high = benchmark.PROFILE.bounds[symbol]
        assert low <= size <= high
