"""The one command for a card: its own logic, on the backends that a machine without one has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_check, gpu_trials
from benchmarks.gpu_trials import Subject
from bifrost_rt import backends
from bifrost_rt.backends import gpu
from bifrost_rt.backends.cuda_provider import CPU
from bifrost_rt.backends.onnxruntime_cuda import OnnxRuntimeCuda
from bifrost_rt.errors import BackendError, BifrostError
from tests.conftest import ALPHA


@pytest.fixture
def subject(alpha_set: Path) -> Subject:
    """The CUDA driver on the CPU; the process that leaves takes a backend by name."""
    return Subject(
        alpha_set, "onnxruntime", lambda: OnnxRuntimeCuda(provider=CPU, device="cpu"), ALPHA
    )


def test_one_command_writes_one_record(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find", lambda *load: "there is no NVIDIA driver")
    record = tmp_path / "gpu.json"
    arguments = ["--engines", str(alpha_set), "--backend", "onnxruntime"]
    trials = ["opening", "image", "recordings", "leaving", "kernels"]
    assert (
        gpu_check.main(
            [*arguments, "--recordings", str(ALPHA), "--json", str(record), "--trials", *trials]
        )
        == 0
    )
    found = json.loads(record.read_text())
    assert found["device"] == {"skipped": "there is no NVIDIA driver"}
    assert found["machine"]["libraries"]["onnxruntime"]
    (row,) = found["sets"]
    assert (row["engines"], row["backend"]) == (alpha_set.name, "onnxruntime")
    assert row["opening"].keys() >= {"denoise", "vae_decode"}
    assert row["opening"]["denoise"]["file_bytes"] > 0
    assert row["image"]["largest"] <= 1
    assert len(row["recordings"]) == 8
    for case in row["recordings"].values():
        assert case["tokens"] < 1e-4
        assert case["latents"] < 1e-4
        assert case["pixels"] <= 1
    assert (row["leaving"]["status"], row["leaving"]["drawn"]) == (0, True)
    assert "CUDA" in row["kernels"]["skipped"]


def test_the_same_bits_are_looked_for_in_every_way_to_run(subject: Subject) -> None:
    found = gpu_trials.repeats(subject)
    assert found["again"]
    assert found["other_thread"]
    for name, threads in (("without_graphs", True), ("with_graphs", False)):
        row = found[name]
        assert row["same"] == [True] * 3
        assert row["opens_in_threads"] == threads
        assert row["little_memory"]["same"] == [True] * 3
        assert row["little_memory"]["engines_come_and_go"]
        assert "eager" not in row
    assert gpu_check.failures(found) == []


def test_other_bits_and_failures_show(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that fails does not take the others' figures with it."""
    whole = OnnxRuntimeCuda.open

    def refused(backend: OnnxRuntimeCuda, *arguments: Any) -> Any:
        if backend.graphs:
            raise BackendError("a recording failed")
        return whole(backend, *arguments)

    monkeypatch.setattr(OnnxRuntimeCuda, "open", refused)
    found = gpu_trials.repeats(subject)
    assert found["without_graphs"]["same"] == [True] * 3
    assert found["with_graphs"]["failed"] == "a recording failed"
    assert gpu_check.failures(found) == ["a recording failed"]
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    assert gpu_trials.apart(black, black) == {"largest": 0, "mean": 0.0}
    assert gpu_trials.apart(black, white) == {"largest": 255, "mean": 255.0, "psnr_db": 0.0}


def test_times_are_those_of_stages_and_of_single_steps(subject: Subject) -> None:
    found = gpu_trials.times(subject)
    for name in ("without_graphs", "with_graphs"):
        row = found[name]
        assert row["stage_ms"].keys() >= {"mllm_text", "denoise", "vae_decode", "total"}
        for loops in (row["loops_first_image"], row["loops_second_image"]):
            assert loops.keys() == {"visual_decode", "denoise"}
            for loop in loops.values():
                assert all(value > 0 for value in loop.values())
    for prompts in gpu_trials.prompt_lengths(subject).values():
        assert prompts.keys() == set(gpu_trials.LONGER)
    assert gpu_trials.transfers(subject, 1 << 16)["write_gb_s"] > 0


def test_answers_are_those_of_the_cpu(subject: Subject) -> None:
    found = gpu_trials.answers(subject)
    for name in ("without_graphs", "with_graphs"):
        for row in found[name].values():
            assert row["as_on_the_cpu"] == [True, True]
            assert row["tokens"] > 0
            assert row["cached_tokens"][1] > 0
            assert row["second_ms"]["per_token"] > 0


def test_kernels_and_calls_are_told_apart() -> None:
    def event(name: str, device: str, us: float) -> Any:
        span = SimpleNamespace(elapsed_us=lambda: us)
        return SimpleNamespace(name=name, device_type=f"DeviceType.{device}", time_range=span)

    events = [event("gemm", "CUDA", 2.0), event("gemm", "CUDA", 3.0), event("norm", "CUDA", 9.0)]
    events += [event("cudaGraphLaunch", "CPU", 1.0), event("aten::zeros", "CPU", 1.0)]
    assert gpu_trials._events(events) == {
        "calls": {"cudaGraphLaunch": 1},
        "kernel_us": 14.0,
        "launches": 3,
        "kernels": [
            {"name": "norm", "count": 1, "us": 9.0},
            {"name": "gemm", "count": 2, "us": 5.0},
        ],
    }


def test_a_trial_that_fails_stands_in_the_record(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fails(subject: Subject) -> dict[str, Any]:
        raise RuntimeError("of a kind that nobody foresaw")

    monkeypatch.setitem(gpu_trials.TRIALS, "image", fails)
    record = tmp_path / "gpu.json"
    arguments = ["--engines", str(alpha_set), "--backend", "onnxruntime", "--json", str(record)]
    assert gpu_check.main([*arguments, "--trials", "image", "transfers"]) == 1
    (row,) = json.loads(record.read_text())["sets"]
    assert row["image"] == {"failed": "RuntimeError: of a kind that nobody foresaw"}
    assert row["transfers"]["read_gb_s"] > 0  # the others are run all the same
    assert "Traceback" in capsys.readouterr().err


def test_without_a_gpu_it_says_why(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find", lambda *load: "there is no NVIDIA driver")
    with pytest.raises(BackendError, match="nothing to try: onnxruntime-cuda: there is no NVIDIA"):
        gpu_check.subjects([alpha_set], [], None, tmp_path)
    with pytest.raises(BifrostError, match="unknown backend 'onnxrutime'"):
        gpu_check.subjects([alpha_set], ["onnxrutime"], None, tmp_path)


def test_sets_go_to_the_backends_that_run_them(
    alpha_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are compiled first, which nobody does here; the third is tried all the same."""

    def refused(folder: Path, backend: str, work: Path) -> Path:
        if backend == "tensorrt":
            raise BackendError("this GPU has no such arithmetic")
        return work / f"{folder.name}-{backend}"

    monkeypatch.setattr(backends.BackendInfo, "unavailable", lambda backend: None)
    monkeypatch.setattr(gpu_check, "compiled", refused)
    found, why = gpu_check.subjects([alpha_set], [], None, tmp_path)
    assert [(subject.folder, subject.backend) for subject in found] == [
        (alpha_set, "onnxruntime-cuda"),
        (tmp_path / f"{alpha_set.name}-tensorrt-rtx", "tensorrt-rtx"),
    ]
    assert why == {f"{alpha_set.name} for tensorrt": "this GPU has no such arithmetic"}
    records: list[dict[str, Any]] = []
    monkeypatch.setattr(gpu_check, "TRIALS", {"opening": lambda subject: {}})
    assert not gpu_check.check(found, why, records.append, ["opening"])
    assert records[-1]["refused"] == why


def test_it_needs_the_runtime_alone() -> None:
    """A machine without internet has what was carried there."""
    import subprocess

    code = (
        "import sys, benchmarks.gpu_check; "
        "heavy = {'torch', 'transformers', 'diffusers', 'onnx', 'matplotlib', 'pytest'}; "
        "sys.exit(', '.join(heavy & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
