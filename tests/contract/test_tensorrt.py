"""The TensorRT driver's own logic, without a GPU: what it binds, refuses and frees.

A double stands in for library and GPU; its names are held to those of the real bindings where they
are installed. That an engine computes the right thing on a GPU is for `test_backends` on a machine
that has one.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bifrost_rt import Generator, manifest
from bifrost_rt.backends import gpu
from bifrost_rt.backends.cuda import Cuda
from bifrost_rt.backends.tensorrt import TensorRtRtx, refusal
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import Compiled, Manifest
from export.engine_set import describe_files
from tests import tensorrt_double as double
from tests.conftest import difference, load_case

COMPILED = Compiled("tensorrt-rtx", "1.7.1.116", ("sm89", "sm120"), ("strongly_typed",), "0" * 64)


@pytest.fixture(scope="module")
def compiled_set(alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as if compiled: its engines are the double's."""
    folder = tmp_path_factory.mktemp("sets") / "double"
    folder.mkdir()
    (folder / "tokenizers").symlink_to(alpha_set / "tokenizers")
    source = manifest.read(alpha_set)
    engines = []
    for spec in source.engines:
        name = f"{spec.name}.engine"
        names = [[t.name for t in side] for side in (spec.inputs, spec.outputs)]
        double.write_engine(folder / name, alpha_set / spec.graph, *names)
        engines.append(dataclasses.replace(spec, graph=name, files=(name,), compiled=COMPILED))
    made = dataclasses.replace(
        source, backend="tensorrt-rtx", engines=tuple(engines), files=describe_files(folder)
    )
    (folder / manifest.FILENAME).write_bytes(made.dumps())
    return folder


@pytest.fixture
def library() -> double.Library:
    return double.Library(double.HostDevice())


def driver_on(library: double.Library, architecture: str = "sm89") -> TensorRtRtx:
    return TensorRtRtx(library, library.device, architecture)


def opened(folder: Path, driver: TensorRtRtx, **changes: Any) -> Any:
    facts = manifest.read(folder)
    spec = dataclasses.replace(facts.engine("t5_text"), **changes)
    return driver.open(folder, spec, facts.dimensions)


def test_a_whole_picture_through_the_driver(compiled_set: Path, library: double.Library) -> None:
    """Every binding, shape and loop of a run, guided and with two prompts."""
    case = load_case("case_04")
    with Generator(compiled_set, backend=driver_on(library)) as generator:
        result = generator.run(**case.request(), output_type="np")
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4
    assert difference(result.images, case.tensors["flux.image_u8"]) <= 1
    del generator
    gc.collect()
    assert library.device.blocks == {}  # nothing of the GPU's memory is left behind


def test_a_loops_step_sets_only_what_it_carries(
    compiled_set: Path, library: double.Library
) -> None:
    with Generator(compiled_set, backend=driver_on(library)) as generator:
        generator.run("a", seed=0, decoding_steps=2, num_inference_steps=6)
    carry = manifest.read(compiled_set).engine("denoise").carry
    (context,) = [c for c in library.contexts if "latents" in c.shapes and len(c.shapes) > 2]
    last = context.calls[-len(carry) * 2 :]
    assert sorted(last) == sorted(f"address {n}" for n in (*carry, *carry.values()))


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
        opened(compiled_set, driver_on(library, architecture), compiled=other)
    assert f"python -m export.compile ONNX_SET --backend tensorrt-rtx --target {architecture}" in (
        str(error.value.hint)
    )
    assert refusal("tensorrt-rtx", "1.7.1.116", "sm120", COMPILED) is None


def test_an_onnx_set_must_be_compiled_first(alpha_set: Path, library: double.Library) -> None:
    with pytest.raises(BackendError, match=r"t5_text\.onnx: this engine is an ONNX graph") as error:
        opened(alpha_set, driver_on(library))
    assert "python -m export.compile" in str(error.value.hint)


@pytest.mark.parametrize("content", [b"", b"foreign", double.MAGIC + b'{"graph": "t'])
def test_a_foreign_or_truncated_file_is_one_clear_error(
    compiled_set: Path, library: double.Library, tmp_path: Path, content: bytes
) -> None:
    facts = manifest.read(compiled_set)
    (tmp_path / "t5_text.engine").write_bytes(content)
    with pytest.raises(BackendError, match=r"t5_text\.engine: ") as error:
        driver_on(library).open(tmp_path, facts.engine("t5_text"), facts.dimensions)
    assert "what follows" not in error.value.message


def test_what_the_library_refuses_is_named(compiled_set: Path, library: double.Library) -> None:
    driver = driver_on(library)
    engine = opened(compiled_set, driver)
    ids = driver.upload(np.zeros((1, 32), np.int64))
    call = engine.bind({"input_ids": ids}, {"prompt_embeds": driver.empty((1, 32, 48), np.float32)})
    library.accepts = False
    with pytest.raises(BackendError, match=r"stage `t5_text`, `input_ids` int64\[1, 32\]"):
        call()
    library.accepts, library.runs = True, False
    with pytest.raises(BackendError, match="could not run the engine: IExecutionContext"):
        call()
    library.runs = True
    call()  # a failure leaves the engine usable
    library.full = True
    with pytest.raises(BackendError, match="cannot load this engine: OutOfMemory"):
        opened(compiled_set, driver)
    library.full, library.on_host = False, ("input_ids",)
    with pytest.raises(BackendError, match="wants input_ids in host memory"):
        opened(compiled_set, driver)


def test_host_arrays_must_be_uploaded(compiled_set: Path, library: double.Library) -> None:
    driver = driver_on(library)
    out = driver.empty((1, 32, 48), np.float32)
    with pytest.raises(BackendError, match="`input_ids`: is in host memory; upload it first"):
        opened(compiled_set, driver).bind(
            {"input_ids": np.zeros((1, 32), np.int64)}, {"prompt_embeds": out}
        )
    with pytest.raises(BackendError, match="cannot write"):
        driver.write(out, np.zeros(3, np.float32))


def test_the_doubles_names_are_the_librarys() -> None:
    """The double cannot drift into an interface that does not exist."""
    trt = pytest.importorskip("tensorrt_rtx")
    for fake, real in (
        (double.Context, trt.IExecutionContext),
        (double.Engine, trt.ICudaEngine),
        (double.Runtime, trt.Runtime),
    ):
        for name in vars(fake):
            if not name.startswith("_"):
                assert hasattr(real, name), name
    for name in ("num_io_tensors", "get_tensor_location"):
        assert hasattr(trt.ICudaEngine, name)
    assert hasattr(trt.TensorLocation, "DEVICE")
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
    driver = TensorRtRtx(real, double.HostDevice(), "sm89")
    with pytest.raises(BackendError, match=r"t5_text\.engine: .* cannot load .*Serial"):
        opened(compiled_set, driver)


def test_cudas_names_are_the_bindings() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    names = ("StreamCreate", "StreamSynchronize", "Malloc", "Free", "MemGetInfo", "MemcpyAsync")
    for name in (*names, "GetErrorString"):
        assert hasattr(runtime, f"cuda{name}")
    if isinstance(gpu.find(), str):
        with pytest.raises(BackendError, match="CUDA: cudaStreamCreate failed: .*driver"):
            Cuda()


class FakeDriver:
    """libcuda with one GPU of compute capability 8.9."""

    def __init__(self, started: int = 0) -> None:
        self._started = started

    def cuInit(self, flags: int) -> int:
        return self._started

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = b"NVIDIA GeForce RTX 4090"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = {75: 8, 76: 9}[attribute]
        return 0


def test_the_gpu_is_asked_of_its_driver() -> None:
    assert gpu.find(lambda name: FakeDriver()) == gpu.Gpu("NVIDIA GeForce RTX 4090", "sm89")
    assert gpu.find(lambda name: FakeDriver(100)) == (
        "the NVIDIA driver is installed but cannot start: no GPU"
    )

    def missing(name: str) -> Any:
        raise OSError(name)

    assert "there is no NVIDIA driver" in str(gpu.find(missing))


def test_a_compiled_sets_manifest_is_read_back(compiled_set: Path, alpha_set: Path) -> None:
    assert manifest.read(compiled_set).engine("denoise").compiled == COMPILED
    assert '"compiled"' not in (alpha_set / manifest.FILENAME).read_text()
    assert isinstance(manifest.read(alpha_set), Manifest)
