"""Engines of one set on several backends."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from bifrost_rt import Generator, backends, cache, manifest
from bifrost_rt.backends.mixed import Mixed
from bifrost_rt.backends.onnxruntime import OnnxRuntime
from bifrost_rt.backends.tensorrt import TensorRtRtx
from bifrost_rt.errors import BackendError
from bifrost_rt.manifest import Compiled
from tests import tensorrt_double as double
from tests.conftest import difference, load_case

COMPILED = Compiled("tensorrt-rtx", "1.7.1.116", ("sm89",), ("strongly_typed",), "0" * 64)
# one that runs once an image, one that loops in decoding and one in denoising
ELSEWHERE = ("t5_text", "visual_decode", "denoise")


@pytest.fixture(scope="module")
def mixed_set(alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The set as if compiled by `export.compile --on-cpu`: the compiled ones are the double's."""
    folder = tmp_path_factory.mktemp("sets") / "mixed"
    return double.write_set(alpha_set, folder, COMPILED, ELSEWHERE)


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "kept"))


def backend_on(library: double.Library) -> TensorRtRtx:
    return TensorRtRtx(library, library.device, "sm89")


def test_engines_on_the_cpu_beside_a_gpu_draw_the_golden_image(mixed_set: Path) -> None:
    library = double.Library(double.HostDevice())
    case = load_case("case_04")
    with Generator(mixed_set, backend=backend_on(library)) as generator:
        assert "t5_text runs on onnxruntime" in generator.backend.reason
        result = generator.run(**case.request(), output_type="np")
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4
    assert difference(result.images, case.tensors["flux.image_u8"]) <= 1
    del generator
    gc.collect()
    assert library.device.blocks == {}


def test_two_cpu_backends_draw_the_golden_image(alpha_set: Path) -> None:
    if reason := backends.BACKENDS["openvino"].unavailable():
        pytest.skip(reason)
    case = load_case("case_04")
    named = "onnxruntime,t5_text=openvino, denoise=openvino"
    with Generator(alpha_set, backend=named) as generator:
        assert generator.backend.name == "onnxruntime"
        assert generator.backend.reason == (
            "it was asked for; t5_text runs on openvino; denoise runs on openvino"
        )
        result = generator.run(**case.request(), output_type="np")
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < 1e-4


def test_what_is_asked_for_comes_before_what_the_set_names(mixed_set: Path) -> None:
    library = double.Library(double.HostDevice())
    facts = manifest.read(mixed_set)
    assert facts.engine("t5_text").backend == "onnxruntime"
    assert isinstance(backends.beside(backend_on(library), {"t5_text": "onnxruntime"}), Mixed)
    host = OnnxRuntime()
    assert backends.beside(host, {"t5_text": "onnxruntime"}) is host


@pytest.mark.parametrize("unified", [False, True])
def test_the_budget_of_a_gpu_counts_the_engines_in_its_memory(
    mixed_set: Path, unified: bool
) -> None:
    device = double.HostDevice()
    device.unified = unified
    library = double.Library(device)
    facts = manifest.read(mixed_set)
    backend, host = backend_on(library), OnnxRuntime()
    mixed = Mixed(backend, {"t5_text": host})
    there, gone = facts.engine("clip_text"), facts.engine("t5_text")
    assert mixed.weights_in_memory(there, 1000) == backend.weights_in_memory(there, 1000)
    expected = host.weights_in_memory(gone, 1000) if unified else 0
    assert mixed.weights_in_memory(gone, 1000) == expected


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("onnxruntime,t5=openvino", "no engine 't5'.*it has mllm_text"),
        ("onnxruntime,t5_txt=openvino", "no engine 't5_txt' .did you mean 't5_text'"),
        ("t5_text=", "cannot read 't5_text='"),
        ("onnxruntime,openvino", "cannot read 'openvino'"),
        ("onnxruntime,", "cannot read ''"),
        ("onnxruntime,t5_text=cpu", "unknown backend 'cpu'"),
    ],
)
def test_what_cannot_be_read_is_refused(alpha_set: Path, asked: str, said: str) -> None:
    with pytest.raises(BackendError, match=said):
        Generator(alpha_set, backend=asked)


def test_a_copy_is_made_at_every_call(mixed_set: Path) -> None:
    """What the caller writes to its buffers between two calls is what is computed."""
    library = double.Library(double.HostDevice())
    backend = backend_on(library)
    mixed = Mixed(backend, {"t5_text": OnnxRuntime()})
    facts = manifest.read(mixed_set)
    engine = mixed.open(mixed_set, facts.engine("t5_text"), facts.dimensions)
    case = load_case("case_04")
    ids, expected = (
        case.tensors["flux.t5_input_ids"].astype(np.int64),
        case.tensors["flux.prompt_embeds"],
    )
    given, out = mixed.upload(ids), mixed.empty(expected.shape, np.float32)
    call = engine.bind({"input_ids": given}, {"prompt_embeds": out})
    call()
    assert difference(mixed.download(out), expected) < 1e-4
    mixed.write(given, ids[::-1].copy())
    call()
    assert difference(mixed.download(out), expected[::-1]) < 1e-4
    engine.close()
