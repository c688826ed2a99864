"""The CUDA provider's driver as far as a machine without a GPU runs it: its buffers, bindings and
loops over onnxruntime's CPU provider, and what it says where the provider is not there."""

from __future__ import annotations

import dataclasses
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from bifrost_rt import Generator, backends, manifest
from bifrost_rt.backends import cuda_provider, gpu, onnxruntime_cuda
from bifrost_rt.backends.cuda_provider import CPU, PROVIDER, left_to_cpu, load_libraries
from bifrost_rt.backends.onnxruntime_cuda import OnnxRuntimeCuda
from bifrost_rt.errors import BackendError
from tests.conftest import difference, load_case


@pytest.fixture(params=[True, False], ids=["graphs", "eager"])
def backend(request: pytest.FixtureRequest) -> OnnxRuntimeCuda:
    return OnnxRuntimeCuda(graphs=request.param, provider=CPU, device="cpu")


def test_a_whole_image_through_the_driver(alpha_set: Path, backend: OnnxRuntimeCuda) -> None:
    case = load_case("case_04")
    with Generator(alpha_set, backend=backend) as generator:
        for _ in range(2):
            result = generator.run(**case.request(), output_type="np")
            assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4
            assert difference(result.images, case.tensors["flux.image_u8"]) <= 1


def test_steps_are_queued_and_waited_for_where_the_loop_ends(
    alpha_set: Path, backend: OnnxRuntimeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = []
    whole = ort.IOBinding.synchronize_outputs

    def counted(binding: ort.IOBinding) -> None:
        waits.append(binding)
        whole(binding)

    monkeypatch.setattr(ort.IOBinding, "synchronize_outputs", counted)
    with Generator(alpha_set, backend=backend) as generator:
        generator.run("a", seed=0, decoding_steps=9, num_inference_steps=7)  # checks the graphs
        waits.clear()
        generator.run("a", seed=0, decoding_steps=9, num_inference_steps=7)
    assert len(waits) == 2  # two loops


def test_buffers_are_the_devices_own(alpha_set: Path, backend: OnnxRuntimeCuda) -> None:
    facts = manifest.read(alpha_set)
    engine = backend.open(alpha_set, facts.engine("t5_text"), facts.dimensions)
    ids = backend.upload(np.zeros((1, 32), np.int64))
    out = backend.empty((1, 32, 48), np.float32)
    with pytest.raises(BackendError, match="`input_ids`: is in host memory; upload it first"):
        engine.bind({"input_ids": np.zeros((1, 32), np.int64)}, {"prompt_embeds": out})
    with pytest.raises(BackendError, match="cannot write float64"):
        backend.write(out, np.zeros((1, 32, 48)))
    call = engine.bind({"input_ids": ids}, {"prompt_embeds": out})
    call()
    before = backend.download(out)
    backend.write(ids, np.ones((1, 32), np.int64))
    call()
    assert not np.array_equal(backend.download(out), before)  # and `before` is a copy
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


class Loader:
    """`onnxruntime.preload_dlls`, which prints what it does not find and raises nothing. It finds
    what lies in a folder that it is given, and what was loaded before."""

    def __init__(self, there: set[str]) -> None:
        self.wanted = {"cuda": ["libcublas.so.13"], "cudnn": ["libcudnn.so.9"]}
        self.there, self.loaded = there, set[str]()
        self.folders: list[str] = []

    def __call__(self, cuda: bool = True, cudnn: bool = True, directory: str = "") -> None:
        self.folders += [directory] if directory else []
        for kind, asked in (("cuda", cuda), ("cudnn", cudnn)):
            for name in self.wanted[kind] if asked else ():
                if (directory and (Path(directory) / name).exists()) or name in self.there:
                    self.loaded.add(name)
                elif name not in self.loaded:
                    print(f"Failed to load {name}: cannot open shared object file")


def test_cudas_libraries_are_loaded_from_wherever_their_packages_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """onnxruntime looks beside itself alone; here the packages are elsewhere on Python's path."""
    for name in ("cu13/lib/libcublas.so.13", "cudnn/lib/libcudnn.so.9"):
        path = tmp_path / "nvidia" / name
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(cuda_provider, "_nvidia_packages", lambda: [tmp_path / "nvidia"])
    loader = Loader(there=set())
    assert load_libraries(loader) == ""
    assert loader.loaded == {"libcublas.so.13", "libcudnn.so.9"}
    beside = Loader(there={"libcublas.so.13", "libcudnn.so.9"})
    assert load_libraries(beside) == ""
    assert beside.folders == []  # a second copy of a library must not be loaded
    monkeypatch.setattr(cuda_provider, "_nvidia_packages", list)
    assert load_libraries(Loader(there={"libcudnn.so.9"})) == (
        "Failed to load libcublas.so.13: cannot open shared object file"
    )
    assert capsys.readouterr().out == ""  # what is printed belongs into the error


def test_the_missing_library_stands_in_the_error(
    alpha_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if PROVIDER in ort.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    monkeypatch.setattr(onnxruntime_cuda, "load_libraries", lambda: "Failed to load libcublas")
    facts = manifest.read(alpha_set)
    with (
        pytest.warns(UserWarning, match="not in available"),
        pytest.raises(BackendError, match="could not start its CUDA.*: Failed to load") as error,
    ):
        OnnxRuntimeCuda().open(alpha_set, facts.engine("t5_text"), facts.dimensions)
    assert "pip install 'bifrost-rt[cuda]'" in str(error.value.hint)


def test_onnxruntimes_own_loader_takes_these_arguments() -> None:
    parameters = inspect.signature(ort.preload_dlls).parameters
    assert {"cuda", "cudnn", "directory"} <= parameters.keys()


def test_what_fails_on_the_way_is_an_error_of_ours(
    alpha_set: Path, backend: OnnxRuntimeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime raises types of its own: of a run, of a wait, and of memory."""
    facts = manifest.read(alpha_set)
    spec = facts.engine("t5_text")
    engine = backend.open(alpha_set, spec, facts.dimensions)
    ids = backend.upload(np.zeros((1, 32), np.int64))
    out = backend.empty((1, 32, 48), np.float32)
    call = engine.bind({"input_ids": ids}, {"prompt_embeds": out})

    def full(*arguments: Any) -> None:
        raise RuntimeError("Failed to allocate\nmemory for requested buffer")

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", full)
    with pytest.raises(
        BackendError, match="engine `t5_text`: onnxruntime .*: Failed to allocate m"
    ):
        call()
    monkeypatch.setattr(ort.IOBinding, "synchronize_outputs", full)
    backend.queued(ort.IOBinding(engine._session))
    with pytest.raises(BackendError, match="a queued step: "):
        backend.wait()
    backend.wait()  # it was reported, and is over
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", full)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", full)
    for ask in (lambda: backend.upload(np.zeros(3)), lambda: backend.empty((3,), np.float64)):
        with pytest.raises(BackendError, match=r"memory for float64\[3\]: ") as error:
            ask()
        assert "--memory-budget" in str(error.value.hint)


def test_of_a_failure_of_cuda_its_own_words_are_kept(
    alpha_set: Path, backend: OnnxRuntimeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime puts a function's signature of 400 characters before them."""

    def fails(*arguments: Any) -> None:
        raise RuntimeError(
            "Error in execution: /src/cuda_call.cc:154 "
            + "std::conditional_t<THRW> " * 30
            + "CUDA failure 900: operation not permitted when stream is capturing ; GPU=0 ; "
            "hostname=x ; file=/src/cuda_allocator.cc ; line=76 ; expr=cudaMalloc(&p, size); "
        )

    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", fails)
    with pytest.raises(BackendError) as error:
        backend.empty((3,), np.float64)
    assert error.value.message.endswith(
        "failed: CUDA failure 900: operation not permitted when stream is capturing"
    )


def test_engines_open_in_threads_unless_steps_are_recorded() -> None:
    """Whoever takes memory of the GPU meanwhile breaks the recording."""
    assert not OnnxRuntimeCuda(graphs=True, provider=CPU, device="cpu").opens_in_threads
    assert OnnxRuntimeCuda(provider=CPU, device="cpu").opens_in_threads


def test_replayed_steps_draw_the_same_image(alpha_set: Path) -> None:
    case = load_case("case_04")
    backend = OnnxRuntimeCuda(graphs=True, provider=CPU, device="cpu")
    with Generator(alpha_set, backend=backend) as generator:
        for _ in range(2):
            result = generator.run(**case.request(), output_type="np")
            assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4
    assert backend.eager == {}


def test_a_replay_that_differs_is_not_used_and_says_so(
    alpha_set: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A replay that does nothing, as a recording that captured nothing would."""
    whole = ort.InferenceSession.run_with_iobinding

    def lost(session: Any, binding: Any, options: Any) -> None:
        if options.get_run_config_entry("gpu_graph_id") == "-1":
            whole(session, binding, options)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", lost)
    case = load_case("case_04")
    backend = OnnxRuntimeCuda(graphs=True, provider=CPU, device="cpu")
    with Generator(alpha_set, backend=backend) as generator:
        result = generator.run(**case.request(), output_type="np")
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4
    assert backend.eager.keys() == {"mllm_text", "visual_decode", "denoise"}
    assert "denoise: runs without a CUDA graph: its first replay differs" in caplog.text


def test_another_thread_does_not_replay_and_does_not_record(
    alpha_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """onnxruntime keeps recordings for each thread: a second one failed on a GPU."""
    case = load_case("case_04")
    backend = OnnxRuntimeCuda(graphs=True, provider=CPU, device="cpu")
    with Generator(alpha_set, backend=backend) as generator:
        generator.run(**case.request(), output_type="np")
        assert backend.eager == {}
        with ThreadPoolExecutor(1) as pool:
            result = pool.submit(generator.run, **case.request(), output_type="np").result()
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4
    assert backend.eager.keys() == {"visual_decode", "denoise"}  # the text is kept
    assert "denoise: runs without a CUDA graph: its steps were recorded in another" in caplog.text


def test_an_engine_that_cannot_be_recorded_runs_without(
    alpha_set: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """onnxruntime refuses to open it where not every node is on the GPU."""
    backend = OnnxRuntimeCuda(graphs=True, provider=CPU, device="cpu")
    whole = backend._session

    def refused(folder: Path, spec: manifest.EngineSpec, *, graphs: bool) -> Any:
        if graphs:
            raise BackendError("This session cannot use the graph capture feature")
        return whole(folder, spec, graphs=False)

    monkeypatch.setattr(backend, "_session", refused)
    facts = manifest.read(alpha_set)
    engine = backend.open(alpha_set, facts.engine("denoise"), facts.dimensions)
    assert not engine.graphs
    assert backend.eager == {"denoise": "This session cannot use the graph capture feature"}
    assert "denoise: runs without a CUDA graph: This session cannot" in caplog.text


def test_arithmetic_on_the_cpu_is_found() -> None:
    def part(provider: str, *operators: str) -> Any:
        nodes = [SimpleNamespace(op_type=operator) for operator in operators]
        return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)

    # what onnxruntime 1.31 leaves to the CPU of this project's engines, and what would be wrong
    sizes = part(CPU, "Shape", "Concat", "Squeeze", "Mul", "Reshape", "Div", "ArgMax")
    assert left_to_cpu([part(PROVIDER, "MatMul"), sizes], PROVIDER) == []
    assigned = [part(PROVIDER, "MatMul"), sizes, part(CPU, "Attention", "RMSNormalization")]
    assert left_to_cpu(assigned, PROVIDER) == ["Attention", "RMSNormalization"]
    assert left_to_cpu(assigned, CPU) == []


def test_the_sessions_own_word_on_its_nodes_is_read(alpha_set: Path) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(alpha_set / "t5_text.onnx", options, providers=[CPU])
    assert "MatMul" in left_to_cpu(session.get_provider_graph_assignment_info(), PROVIDER)


def test_availability_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.BACKENDS["onnxruntime-cuda"]
    if isinstance(gpu.find(), str):
        assert backend.unavailable() == gpu.find()
        assert backend.remedy() is None
    monkeypatch.setattr(gpu, "find", lambda: gpu.Gpu("NVIDIA H200", "sm90"))
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    assert backend.unavailable() == (
        "the installed onnxruntime was built without CUDAExecutionProvider"
    )
    assert str(backend.remedy()).startswith("pip uninstall onnxruntime, then pip install")
    monkeypatch.setattr(ort, "get_available_providers", lambda: [PROVIDER, CPU])
    assert backend.unavailable() is None
    absent = dataclasses.replace(backend, library="not_there")
    assert absent.unavailable() == "the Python package `not_there` is not installed"
    assert absent.remedy() == "pip install 'bifrost-rt[cuda]'"
