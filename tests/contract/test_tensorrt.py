"""The TensorRT backend's own logic, without a GPU: what it binds, refuses and frees.

A double stands in for library and GPU; its names are held to those of the real bindings where they
are installed. That an engine computes the right thing on a GPU is for `test_backends` on a machine
that has one.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bifrost_rt import Generator, cache, manifest, memory_plan
from bifrost_rt.backends import gpu
from bifrost_rt.backends.cuda import Cuda
from bifrost_rt.backends.kernels import Kernels
from bifrost_rt.backends.tensorrt import TensorRt, TensorRtRtx, refusal, too_old
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import Compiled, Manifest
from export.compile import bound, graphs
from export.compile import builder as builders
from export.errors import CompileError
from tests import tensorrt_double as double
from tests.conftest import difference, load_case
from tests.linked_layouts import as_a_hub

COMPILED = Compiled("tensorrt-rtx", "1.7.1.116", ("sm89", "sm120"), ("strongly_typed",), "0" * 64)


@pytest.fixture(scope="module")
def compiled_set(alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as if compiled: its engines are the double's."""
    return double.write_set(alpha_set, tmp_path_factory.mktemp("sets") / "double", COMPILED)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.fixture
def library() -> double.Library:
    return double.Library(double.HostDevice())


def backend_on(library: double.Library, architecture: str = "sm89") -> TensorRtRtx:
    return TensorRtRtx(library, library.device, architecture)


def opened(folder: Path, backend: TensorRtRtx, **changes: Any) -> Any:
    facts = manifest.read(folder)
    spec = dataclasses.replace(facts.engine("t5_text"), **changes)
    return backend.open(folder, spec, facts.dimensions)


def test_a_whole_image_through_the_driver(compiled_set: Path, library: double.Library) -> None:
    """Every binding, shape and loop of a run, guided and with two prompts."""
    case = load_case("case_04")
    with Generator(compiled_set, backend=backend_on(library)) as generator:
        result = generator.run(**case.request(), output_type="np")
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4
    assert difference(result.images, case.tensors["flux.image_u8"]) <= 1
    del generator
    gc.collect()
    assert library.device.blocks == {}  # nothing of the GPU's memory is left behind


def test_engines_behind_links_are_opened(
    compiled_set: Path, library: double.Library, tmp_path: Path
) -> None:
    whole = Path(shutil.copytree(compiled_set, tmp_path / "whole"))
    drawn = []
    for folder in (whole, as_a_hub(whole, tmp_path / "hub")):
        with Generator(folder, backend=backend_on(library)) as generator:
            drawn.append(generator.run(**SHORT, num_inference_steps=1).images)
    assert np.array_equal(*drawn)


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def either(request: pytest.FixtureRequest) -> double.Library:
    """With CUDA graphs of its own, and without."""
    return double.Library(double.HostDevice(), graphs=request.param == "tensorrt-rtx")


SHORT: dict[str, Any] = {"prompt": "a", "seed": 0, "output_type": "np"}


def test_steps_change_nothing_and_wait_for_nothing(
    compiled_set: Path, either: double.Library
) -> None:
    """The loop's own cost on the host: the same for any number of steps."""
    with Generator(compiled_set, backend=backend_on(either), prompt_cache=0) as generator:
        found = []
        for steps in (4, 5, 9, 9):
            before = either.device.waits, sum(len(c.calls) for c in either.contexts)
            generator.run(**SHORT, decoding_steps=steps, num_inference_steps=steps)
            after = either.device.waits, sum(len(c.calls) for c in either.contexts)
            found.append((after[0] - before[0], after[1] - before[1]))
    # the first run checks the graphs beside; what has kept its size is not set again
    assert found[1][0] == found[2][0]
    assert found[1][1] >= found[2][1]
    assert found[3] == (found[2][0], 0)  # the same sizes: nothing is set again


def test_replayed_steps_draw_the_same_image(compiled_set: Path, either: double.Library) -> None:
    plain = double.Library(either.device, graphs=False)
    off = TensorRtRtx(plain, plain.device, "sm89", graphs=False)
    steps = {"decoding_steps": 5, "num_inference_steps": 7}
    with Generator(compiled_set, backend=off) as generator:
        expected = generator.run(**SHORT, **steps)
    assert either.device.captures == 0
    backend = backend_on(either)
    with Generator(compiled_set, backend=backend) as generator:
        for _ in range(2):
            found = generator.run(**SHORT, **steps)
            assert np.array_equal(found.latents, expected.latents)
            assert np.array_equal(found.images, expected.images)
    assert backend.eager == {}
    if not hasattr(either, "CudaGraphStrategy"):
        # per loop two recordings, and all but the two first steps of the first image replayed;
        # one of the text engine, which read the prompt once
        assert either.device.captures == 2 * 2 + 1
        assert either.device.launches >= 2 * (5 + 7) - 4


@pytest.mark.parametrize("fault", ["empty", "different", "refused"])
def test_steps_that_cannot_be_replayed_run_eagerly_and_say_why(
    compiled_set: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    library = double.Library(double.HostDevice(), graphs=False)
    reason = {
        "empty": "the graph is empty",
        "different": "its first replay differs from the eager run",
        "refused": "the library says that it cannot be recorded",
    }[fault]
    library.device.drops = fault == "empty"
    library.capturable = fault != "refused"
    if fault == "different":
        library.device.spoils = lambda: spoil(library)
    case = load_case("case_04")
    backend = backend_on(library)
    with Generator(compiled_set, backend=backend) as generator:
        result = generator.run(**case.request(), output_type="np")
    spoilt = {"visual_decode", "denoise"}  # the only ones that `spoil` changes
    assert backend.eager.keys() == (spoilt if fault == "different" else {*spoilt, "mllm_text"})
    assert all(reason in why for why in backend.eager.values())
    assert "denoise: runs without a CUDA graph: " in caplog.text
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4


def spoil(library: double.Library) -> None:
    """A replay that writes something else."""
    names = ("next_latents", "next_tokens")
    found = {c.addresses[name] for c in library.contexts for name in names if name in c.addresses}
    for address in found & library.device.blocks.keys():
        library.device.blocks[address][:4] ^= 0x55


def test_the_librarys_own_graphs_are_checked_too(compiled_set: Path) -> None:
    library = double.Library(double.HostDevice())
    library.device.spoils = lambda: spoil(library)
    case = load_case("case_04")
    backend = backend_on(library)
    with Generator(compiled_set, backend=backend) as generator:
        result = generator.run(**case.request(), output_type="np")
    assert backend.eager.keys() == {"visual_decode", "denoise"}
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4


def test_what_the_library_warns_of_is_the_reason(compiled_set: Path) -> None:
    """It computes the right thing then, kernel by kernel, and says nothing else."""
    library = double.Library(double.HostDevice())
    library.warns = "CUDA graph capture failed:\n falling back"
    backend = backend_on(library)
    with Generator(compiled_set, backend=backend) as generator:
        generator.run(**SHORT, decoding_steps=4, num_inference_steps=4)
    for name in ("visual_decode", "denoise"):
        assert backend.eager[name] == (
            "the library could not record it (the library warned: CUDA graph capture failed: "
            "falling back)"
        )


def test_a_warning_of_something_else_is_no_reason(compiled_set: Path) -> None:
    library = double.Library(double.HostDevice())
    library.warns = "The profile is not the best."
    backend = backend_on(library)
    with Generator(compiled_set, backend=backend) as generator:
        generator.run(**SHORT, decoding_steps=4, num_inference_steps=4)
    assert backend.eager == {}


def test_the_second_context_is_checked_as_the_first_is(compiled_set: Path) -> None:
    library = double.Library(double.HostDevice())

    def second(context: double.Context) -> bool:
        twins = [c for c in library.contexts if c.file == context.file and c.graph]
        return "denoise" in context.file and twins.index(context) == 1

    library.faulty = second
    case, backend = load_case("case_04"), backend_on(library)
    with Generator(compiled_set, backend=backend) as generator:
        result = generator.run(**case.request(), output_type="np")
    assert backend.eager == {"denoise": "its first replay differs from the eager run"}
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4


TEXT_STAGES = ("mllm_text", "clip_text", "t5_text", "conditioning")
STAGES = (*TEXT_STAGES, "visual_decode", "control_embed", "denoise")


def one_image(folder: Path, version: str = COMPILED.version, budget: str | None = None) -> Any:
    """Draw with a new backend, and return its library."""
    library = double.Library(double.HostDevice())
    library.__version__ = version  # type: ignore[misc]
    with Generator(folder, backend=backend_on(library), memory_budget=budget) as generator:
        generator.run(**SHORT, decoding_steps=2, num_inference_steps=1)
        assert len(library.caches) == 1  # all contexts share it
    return library


def test_kernels_are_compiled_once_and_kept_for_the_next_process(
    compiled_set: Path, kept: Path
) -> None:
    assert sorted(one_image(compiled_set).compiled) == sorted((*STAGES, "vae_decode"))
    (file,) = (kept / "kernels").iterdir()
    before = file.read_bytes()
    assert one_image(compiled_set).compiled == []
    assert file.read_bytes() == before
    file.write_bytes(before[:-1])  # damaged
    assert len(one_image(compiled_set).compiled) == 8
    assert file.read_bytes() == before
    file.unlink()
    with cache.switched_off():  # --no-cache
        assert len(one_image(compiled_set).compiled) == 8
    assert list((kept / "kernels").iterdir()) == []
    assert not cache.off()


def test_kernels_of_another_driver_gpu_or_version_are_not_taken(
    kept: Path,
) -> None:
    machines = [("RTX 4090", "sm89", "tensorrt-rtx", "1.7.1.116", "13000")]
    machines += [(*machines[0][:-1], "12080"), ("RTX 4080", *machines[0][1:])]
    machines += [(*machines[0][:3], "1.6.0.1", "13000")]
    library = double.Library(double.HostDevice())
    for machine in machines:
        kernels = Kernels(machine)
        kernels.use(double.RuntimeConfig(library))
        assert library.caches[-1].kernels == set()
        library.caches[-1].kernels.add("t5_text")
        kernels.keep()
    assert len(list((kept / "kernels").iterdir())) == len(machines)


def test_kernels_that_cannot_be_kept_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    kernels = Kernels(("a",))
    kernels.use(double.RuntimeConfig(double.Library(double.HostDevice())))
    kernels.keep()
    assert "compiled kernels cannot be kept for the next start: " in caplog.text


def test_the_builders_word_on_memory_counts_whatever_is_drawn(compiled_set: Path) -> None:
    facts = manifest.read(compiled_set)
    told = dataclasses.replace(COMPILED, activation_bytes=12345)
    engines = tuple(dataclasses.replace(spec, compiled=told) for spec in facts.engines)
    facts = dataclasses.replace(facts, engines=engines)
    for images in (1, 3):
        sizes = memory_plan.sizes(facts, images=images)
        needs = memory_plan.needs(facts, STAGES, sizes, lambda spec, stored: stored)
        assert [need.scratch for need in needs] == [12345] * len(STAGES)


def test_a_call_outlives_another_binding_but_not_its_engine(
    compiled_set: Path, either: double.Library
) -> None:
    """Recorded work is dropped with the context that it was recorded in."""
    facts, backend = manifest.read(compiled_set), backend_on(either)
    spec = facts.engine("denoise")
    engine = backend.open(compiled_set, spec, facts.dimensions)
    sizes = {"images": 1, "steps": 3}

    def empty(tensor: Any) -> Any:
        shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
        return backend.upload(np.zeros(shape, tensor.dtype))

    inputs = {t.name: empty(t) for t in spec.inputs}
    outputs = [{t.name: empty(t) for t in spec.outputs} for _ in range(4)]
    calls = [engine.bind(inputs, out) for out in outputs]  # two contexts, two calls on each
    for _ in range(3):
        for call in calls:
            call()
    values = [backend.download(out["next_latents"]) for out in outputs]
    assert all(np.array_equal(value, values[0]) for value in values[1:])
    engine.close()
    with pytest.raises(BackendError, match="engine `denoise` is closed"):
        calls[0]()


def test_weights_are_uploaded_once_and_bound_by_address(
    alpha_set: Path, compiled_set: Path, tmp_path: Path, library: double.Library
) -> None:
    graph = graphs.read(alpha_set / "t5_text.onnx", "t5_text")
    tensors = bound.bind(graph)
    assert tensors
    weights = bound.store(tensors, tmp_path / "t5_text.weights")
    ir.save(graph, tmp_path / "t5_text.onnx", external_data="t5_text.data")
    facts = manifest.read(compiled_set)
    spec = facts.engine("t5_text")
    names = [t.name for t in spec.inputs] + [w.name for w in weights]
    double.write_engine(
        tmp_path / "t5_text.engine", tmp_path / "t5_text.onnx", names, ["prompt_embeds"]
    )
    compiled = dataclasses.replace(COMPILED, weights=weights)
    files = ("t5_text.engine", "t5_text.weights")
    spec = dataclasses.replace(spec, compiled=compiled, files=files)
    backend, case = backend_on(library), load_case("case_04")
    engine = backend.open(tmp_path, spec, facts.dimensions)
    ids = backend.upload(case.tensors["flux.t5_input_ids"].astype(np.int64))
    expected = case.tensors["flux.prompt_embeds"]
    out = backend.empty(expected.shape, np.float32)
    engine.bind({"input_ids": ids}, {"prompt_embeds": out})()
    assert difference(backend.download(out), expected) < 1e-4
    resident = sum(block.nbytes for block in library.device.blocks.values())
    size = (tmp_path / "t5_text.weights").stat().st_size
    assert resident == size + ids.nbytes + out.nbytes + double.SCRATCH
    # a second engine on the same file, and one that reads a part of it as another's
    part = dataclasses.replace(spec, files=files[:1], shared={files[1]: weights[0].size})
    others = [backend.open(tmp_path, one, facts.dimensions) for one in (spec, part)]
    resident = sum(block.nbytes for block in library.device.blocks.values())
    assert resident == size + ids.nbytes + out.nbytes + 3 * double.SCRATCH
    for one in others:
        backend.write(out, np.zeros(expected.shape, np.float32))
        one.bind({"input_ids": ids}, {"prompt_embeds": out})()
        assert difference(backend.download(out), expected) < 1e-4
        one.close()
    engine.close()
    del engine, others, one
    alone = backend.open(tmp_path, part, facts.dimensions)  # the file's own engine is not there
    resident = sum(block.nbytes for block in library.device.blocks.values())
    assert resident == sum(w.size for w in weights) + ids.nbytes + out.nbytes + double.SCRATCH
    backend.write(out, np.zeros(expected.shape, np.float32))
    alone.bind({"input_ids": ids}, {"prompt_embeds": out})()
    assert difference(backend.download(out), expected) < 1e-4
    alone.close()
    del alone
    assert sum(b.nbytes for b in library.device.blocks.values()) == ids.nbytes + out.nbytes
    path = tmp_path / "t5_text.weights"
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(BackendError, match=r"t5_text\.weights: ends before the weight "):
        backend.open(tmp_path, spec, facts.dimensions)


@pytest.mark.parametrize(
    ("changes", "architecture", "message"),
    [
        ({"version": "1.6.0.1"}, "sm89", "was compiled by tensorrt-rtx 1.6.0.1, this is 1.7.1.116"),
        ({}, "sm86", "was compiled for sm89, sm120, this GPU is sm86"),
        ({"builder": "tensorrt"}, "sm89", "was compiled by tensorrt, this is tensorrt-rtx"),
    ],
)
def test_an_engine_for_something_else_is_refused_with_the_command(
    compiled_set: Path,
    library: double.Library,
    changes: dict[str, str],
    architecture: str,
    message: str,
) -> None:
    other = dataclasses.replace(COMPILED, **changes)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=message) as error:
        opened(compiled_set, backend_on(library, architecture), compiled=other)
    assert f"python -m export.compile ONNX_SET --backend tensorrt-rtx --target {architecture}" in (
        str(error.value.hint)
    )
    assert refusal("tensorrt-rtx", "1.7.1.116", "sm120", COMPILED) is None


@pytest.mark.parametrize(
    ("name", "version", "good"),
    [
        ("tensorrt", "10.3.0", False),  # JetPack 6
        ("tensorrt", "10.13.3.9", False),  # JetPack 7.0
        ("tensorrt", "9.9.9", False),
        ("tensorrt", "10.15.1.29", True),
        ("tensorrt", "10.16.2.10", True),  # JetPack 7.2
        ("tensorrt", "11.0.0", True),
        ("tensorrt-rtx", "1.7.1.116", True),
    ],
)
def test_a_tensorrt_that_is_too_old_is_known(name: str, version: str, good: bool) -> None:
    assert (too_old(name, version) is None) == good


def test_a_tensorrt_that_is_too_old_is_refused_before_anything(
    library: double.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JetPack 6 would fail at a name that its parser lacks, deep in a compilation."""
    monkeypatch.setattr(library, "__version__", "10.3.0", raising=False)
    with pytest.raises(BackendError, match=r"tensorrt 10\.3\.0 is too old: .* 10\.15") as error:
        TensorRt(library, library.device, "sm87")
    assert "JetPack 7.2" in str(error.value.hint)
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.3.0"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(CompileError, match=r"tensorrt 10\.3\.0 is too old") as refused:
        builders.find("tensorrt")
    assert "JetPack 7.2" in str(refused.value.hint)


def test_an_onnx_set_must_be_compiled_first(alpha_set: Path, library: double.Library) -> None:
    with pytest.raises(BackendError, match=r"t5_text\.onnx: this engine is an ONNX graph") as error:
        opened(alpha_set, backend_on(library))
    assert "python -m export.compile" in str(error.value.hint)


@pytest.mark.parametrize("content", [b"", b"foreign", double.MAGIC + b'{"graph": "t'])
def test_a_foreign_or_truncated_file_is_one_clear_error(
    compiled_set: Path, library: double.Library, tmp_path: Path, content: bytes
) -> None:
    facts = manifest.read(compiled_set)
    (tmp_path / "t5_text.engine").write_bytes(content)
    with pytest.raises(BackendError, match=r"t5_text\.engine: ") as error:
        backend_on(library).open(tmp_path, facts.engine("t5_text"), facts.dimensions)
    assert "what follows" not in error.value.message


def test_what_the_library_refuses_is_named(compiled_set: Path, library: double.Library) -> None:
    backend = backend_on(library)
    engine = opened(compiled_set, backend)
    ids = backend.upload(np.zeros((1, 32), np.int64))
    call = engine.bind(
        {"input_ids": ids}, {"prompt_embeds": backend.empty((1, 32, 48), np.float32)}
    )
    library.accepts = False
    with pytest.raises(BackendError, match=r"engine `t5_text`, `input_ids` int64\[1, 32\]"):
        call()
    library.accepts, library.runs = True, False
    with pytest.raises(BackendError, match="could not run the engine: IExecutionContext"):
        call()
    library.runs = True
    call()  # a failure leaves the engine usable
    library.full = True
    with pytest.raises(BackendError, match="cannot load this engine: OutOfMemory"):
        opened(compiled_set, backend)
    library.full, library.on_host = False, ("input_ids",)
    with pytest.raises(BackendError, match="wants input_ids in host memory"):
        opened(compiled_set, backend)


def test_a_missing_shared_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The package is there; what it loads is not."""
    package = tmp_path / "tensorrt_rtx.py"
    package.write_text("raise OSError('libtensorrt_rtx.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    for load, error in ((TensorRtRtx, BackendError), (builders.find, CompileError)):
        with pytest.raises(error, match=r"cannot be loaded: libtensorrt_rtx\.so\.1") as told:
            load(*(() if load is TensorRtRtx else ("tensorrt-rtx",)))
        assert "pip install" in str(told.value.hint)


def test_host_arrays_must_be_uploaded(compiled_set: Path, library: double.Library) -> None:
    backend = backend_on(library)
    out = backend.empty((1, 32, 48), np.float32)
    with pytest.raises(BackendError, match="`input_ids`: is in host memory; upload it first"):
        opened(compiled_set, backend).bind(
            {"input_ids": np.zeros((1, 32), np.int64)}, {"prompt_embeds": out}
        )
    with pytest.raises(BackendError, match="cannot write"):
        backend.write(out, np.zeros(3, np.float32))


def test_the_doubles_names_are_the_librarys() -> None:
    """The double cannot drift into an interface that does not exist."""
    trt = pytest.importorskip("tensorrt_rtx")
    for fake, real in (
        (double.Context, trt.IExecutionContext),
        (double.RuntimeConfig, trt.IRuntimeConfig),
        (double.RuntimeCache, trt.IRuntimeCache),
        (double.Engine, trt.ICudaEngine),
        (double.Runtime, trt.Runtime),
    ):
        for name in vars(fake):
            if not name.startswith("_") and name not in ("strategy", "graph", "file"):
                assert hasattr(real, name), name
    for name in ("num_io_tensors", "get_tensor_location", "device_memory_size_v2"):
        assert hasattr(trt.ICudaEngine, name)
    assert hasattr(trt.TensorLocation, "DEVICE")
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(trt.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
    assert {m for m in vars(double.HostDevice) if not m.startswith("_")} - {"view"} <= {
        *vars(Cuda),
        "stream",
    }


def test_the_real_library_refuses_a_foreign_file_in_our_words(
    compiled_set: Path, tmp_path: Path
) -> None:
    """The double's file is foreign to the library itself."""
    trt = pytest.importorskip("tensorrt_rtx")
    from bifrost_rt.backends.tensorrt_log import logger

    real = SimpleNamespace(
        __version__=COMPILED.version, Runtime=trt.Runtime, logger=logger("tensorrt_rtx")
    )
    backend = TensorRtRtx(real, double.HostDevice(), "sm89")
    with pytest.raises(BackendError, match=r"t5_text\.engine: .* cannot load .*Serial"):
        opened(compiled_set, backend)


def test_cudas_names_are_the_bindings() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = [
        "StreamCreateWithFlags",
        "StreamSynchronize",
        "Malloc",
        "Free",
        "MemGetInfo",
        "MemcpyAsync",
    ]
    names += ["StreamBeginCapture", "StreamEndCapture", "GraphGetNodes", "GraphInstantiate"]
    names += ["GraphLaunch", "GraphDestroy", "GraphExecDestroy", "GetErrorString"]
    for name in names:
        assert hasattr(runtime, f"cuda{name}")
    if isinstance(gpu.find(), str):
        with pytest.raises(BackendError, match="CUDA: cudaStreamCreateWithFlags failed: .*driver"):
            Cuda()


class FakeDriver:
    """libcuda with one GPU of compute capability 8.9."""

    def __init__(self, started: int = 0) -> None:
        self._started = started
        self.resident = self.current = 0  # contexts

    def cuInit(self, flags: int) -> int:
        return self._started

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13000
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA GeForce RTX 4090"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.resident += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:
        self.resident -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self.current += 1
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        self.current -= 1
        return 0

    def cuMemGetInfo_v2(self, free: Any, whole: Any) -> int:
        assert (self.resident, self.current) == (1, 1)
        free._obj.value, whole._obj.value = 20 << 30, 24 << 30
        return 0


def test_the_gpu_is_asked_of_its_driver() -> None:
    assert gpu.find(lambda name: FakeDriver()) == gpu.Gpu("NVIDIA GeForce RTX 4090", "sm89")
    assert gpu.find(lambda name: FakeDriver(100)) == (
        "the NVIDIA driver is installed but cannot start: no GPU"
    )

    def missing(name: str) -> Any:
        raise OSError(name)

    assert "there is no NVIDIA driver" in str(gpu.find(missing))
    assert gpu.driver_version(lambda name: FakeDriver()) == "13000"
    assert gpu.driver_version(missing) == ""
    backend = FakeDriver()
    assert gpu.free_bytes(lambda name: backend) == 20 << 30
    assert (backend.resident, backend.current) == (0, 0)  # everything is given back
    assert gpu.free_bytes(missing) is None


def test_a_compiled_sets_manifest_is_read_back(compiled_set: Path, alpha_set: Path) -> None:
    assert manifest.read(compiled_set).engine("denoise").compiled == COMPILED
    assert '"compiled"' not in (alpha_set / manifest.FILENAME).read_text()
    assert isinstance(manifest.read(alpha_set), Manifest)
