"""The GPU's memory, its stream and its recordings, over a double of NVIDIA's bindings."""

from __future__ import annotations

import inspect

import pytest

from benchmarks import gpu_device
from bifrost_rt import memory_plan
from bifrost_rt.backends.cuda import Cuda
from bifrost_rt.errors import BackendError
from tests import cuda_double as double


def test_everything_that_is_checked_on_a_gpu_is_right_on_the_double() -> None:
    runtime = double.Runtime()
    found = gpu_device.check(runtime, size=4096)
    assert found["copies_agree"]
    assert found["replay_agrees"]
    assert found["legacy_stream_meanwhile"] == "worked"
    assert found["taken_for_two_buffers"] == 2 * 4096
    assert found["free_bytes_at_the_end"] == found["free_bytes"]
    assert found["refusals"] == {
        "empty_recording": "CUDA: the graph is empty",
        "failed_recording": "work that failed",
        "too_much_memory": "CUDA: cudaMalloc failed: status 2",
    }
    assert runtime.blocks == {}
    assert runtime.launches > 0


def test_a_stream_that_waits_for_the_default_one_would_show() -> None:
    """The double is as strict as a GPU: this is what the flag is for."""
    runtime = double.Runtime()
    runtime.cudaStreamNonBlocking = 0  # type: ignore[misc]
    with pytest.raises(BackendError, match="cudaStreamEndCapture failed"):
        gpu_device.check(runtime, size=4096)


def test_memory_that_the_machine_shares_is_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_plan, "host_memory", lambda: 123)
    assert Cuda(double.Runtime(integrated=True)).free_bytes() == 123
    assert Cuda(double.Runtime()).free_bytes() == double.MEMORY
    monkeypatch.setattr(memory_plan, "host_memory", lambda: None)  # it does not say
    assert Cuda(double.Runtime(integrated=True)).free_bytes() == double.MEMORY


def test_a_driver_that_is_too_old_says_what_to_do() -> None:
    runtime = double.Runtime({"cudaStreamCreateWithFlags": double.OLD_DRIVER})
    with pytest.raises(BackendError, match="cudaStreamCreateWithFlags failed") as error:
        Cuda(runtime)
    hint = str(error.value.hint)
    assert "goes up to CUDA 12.4" in hint
    assert "is for CUDA 13.5" in hint
    assert "cuda-bindings<13" in hint


def test_full_memory_says_what_to_do() -> None:
    cuda = Cuda(double.Runtime())
    with pytest.raises(BackendError, match="cudaMalloc failed") as error:
        cuda.allocate(double.MEMORY + 1)
    assert "--memory-budget" in str(error.value.hint)


def test_the_doubles_functions_are_the_bindings() -> None:
    real = pytest.importorskip("cuda.bindings.runtime")
    for name, _ in inspect.getmembers(double.Runtime):
        if name.startswith(("cuda", "CUDA")):
            assert hasattr(real, name), name
    for group in ("cudaMemcpyKind", "cudaDeviceAttr", "cudaStreamCaptureMode"):
        for name, value in vars(getattr(double.Runtime, group)).items():
            assert int(getattr(getattr(real, group), name)) == value, name
    assert real.cudaStreamNonBlocking == double.NON_BLOCKING
    assert int(real.cudaError_t.cudaErrorInsufficientDriver) == double.OLD_DRIVER
    assert int(real.cudaError_t.cudaErrorMemoryAllocation) == double.FULL
