"""The GPU benchmark's own logic, on a driver that this machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gpu as benchmark
from bifrost_rt import manifest
from bifrost_rt.backends import gpu
from bifrost_rt.backends.onnxruntime_cuda import CPU, OnnxRuntimeCuda
from bifrost_rt.manifest import Range


def test_steps_are_timed_on_any_driver(alpha_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "SIZES", {**benchmark.SIZES, "text_tokens": 20})
    driver = OnnxRuntimeCuda(provider=CPU, device="cpu")
    for stage in ("visual_decode", "denoise"):
        ranges = {symbol: Range(1, high) for symbol, high in benchmark.SIZES.items()}
        engine = driver.open(alpha_set, manifest.read(alpha_set).engine(stage), ranges)
        found = benchmark.time_steps(driver, engine, 3)
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


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if not isinstance(gpu.find(), str):
        pytest.skip("this machine has one")
    assert benchmark.main([]) == 1
    assert capsys.readouterr().out.startswith("no GPU: ")
