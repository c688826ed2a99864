"""The CUDA provider's driver as far as a machine without a GPU runs it: its buffers, bindings and
loops over onnxruntime's CPU provider, and what it says where the provider is not there."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from bifrost_rt import Generator, backends, manifest
from bifrost_rt.backends import gpu
from bifrost_rt.backends.onnxruntime_cuda import CPU, PROVIDER, OnnxRuntimeCuda, left_to_cpu
from bifrost_rt.errors import BackendError
from tests.conftest import difference, load_case


@pytest.fixture
def driver() -> OnnxRuntimeCuda:
    return OnnxRuntimeCuda(provider=CPU, device="cpu")


def test_a_whole_picture_through_the_driver(alpha_set: Path, driver: OnnxRuntimeCuda) -> None:
    case = load_case("case_04")
    with Generator(alpha_set, backend=driver) as generator:
        for _ in range(2):
            result = generator.run(**case.request(), output_type="np")
            assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4
            assert difference(result.images, case.tensors["flux.image_u8"]) <= 1


def test_steps_are_queued_and_waited_for_where_the_loop_ends(
    alpha_set: Path, driver: OnnxRuntimeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    whole = ort.IOBinding.synchronize_outputs

    def counted(binding: ort.IOBinding) -> None:
        waits.append(binding)
        whole(binding)

    monkeypatch.setattr(ort.IOBinding, "synchronize_outputs", counted)
    with Generator(alpha_set, backend=driver) as generator:
        generator.run("a", seed=0, decoding_steps=9, num_inference_steps=7)
    assert len(waits) == 2  # two loops


def test_buffers_are_the_devices_own(alpha_set: Path, driver: OnnxRuntimeCuda) -> None:
    facts = manifest.read(alpha_set)
    engine = driver.open(alpha_set, facts.engine("t5_text"), facts.dimensions)
    ids = driver.upload(np.zeros((1, 32), np.int64))
    out = driver.empty((1, 32, 48), np.float32)
    with pytest.raises(BackendError, match="`input_ids`: is in host memory; upload it first"):
        engine.bind({"input_ids": np.zeros((1, 32), np.int64)}, {"prompt_embeds": out})
    with pytest.raises(BackendError, match="cannot write float64"):
        driver.write(out, np.zeros((1, 32, 48)))
    call = engine.bind({"input_ids": ids}, {"prompt_embeds": out})
    call()
    before = driver.download(out)
    driver.write(ids, np.ones((1, 32), np.int64))
    call()
    assert not np.array_equal(driver.download(out), before)  # and `before` is a copy
    engine.close()
    with pytest.raises(BackendError, match="`t5_text` is closed"):
        engine.bind({"input_ids": ids}, {"prompt_embeds": out})


def test_a_provider_that_does_not_start_is_an_error(alpha_set: Path) -> None:
    """onnxruntime itself would warn and use the CPU."""
    if PROVIDER in ort.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    facts = manifest.read(alpha_set)
    with (
        pytest.warns(UserWarning, match="not in available"),
        pytest.raises(BackendError, match=r"t5_text\.onnx: .*could not start its CUDA"),
    ):
        OnnxRuntimeCuda().open(alpha_set, facts.engine("t5_text"), facts.dimensions)


def test_arithmetic_on_the_cpu_is_found() -> None:
    def part(provider: str, *operators: str) -> Any:
        nodes = [SimpleNamespace(op_type=operator) for operator in operators]
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)

    assigned = [part(PROVIDER, "MatMul"), part(CPU, "Shape", "Attention"), part(CPU, "Concat")]
    assert left_to_cpu(assigned, PROVIDER) == ["Attention"]
    assert left_to_cpu(assigned, CPU) == []


def test_the_sessions_own_word_on_its_nodes_is_read(alpha_set: Path) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(alpha_set / "t5_text.onnx", options, providers=[CPU])
    assert "MatMul" in left_to_cpu(session.get_provider_graph_assignment_info(), PROVIDER)


def test_availability_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = backends.DRIVERS["onnxruntime-cuda"]
    if isinstance(gpu.find(), str):
        assert driver.unavailable() == gpu.find()
        assert driver.remedy() is None
    monkeypatch.setattr(gpu, "find", lambda: gpu.Gpu("NVIDIA H200", "sm90"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    assert driver.unavailable() == (
        "the installed onnxruntime was built without CUDAExecutionProvider"
    )
    assert str(driver.remedy()).startswith("pip uninstall onnxruntime, then pip install")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER, CPU])
    assert driver.unavailable() is None
    absent = dataclasses.replace(driver, library="not_there")
    assert absent.unavailable() == "the Python package `not_there` is not installed"
    assert absent.remedy() == "pip install 'bifrost-rt[cuda]'"
