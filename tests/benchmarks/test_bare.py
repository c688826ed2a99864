"""The bare run is an honest opponent: our images, on the backend's own settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.bare import Bare, openvino_options
from benchmarks.metering import Meter
from bifrost_rt import backends, manifest
from bifrost_rt import processor as processors
from bifrost_rt.errors import BackendError, EngineSetError
from bifrost_rt.manifest import Compiled
from tests.processors import AVX2

REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "a red circle", "seed": 3},
    {"prompt": ["a red circle", "two blue squares", "a red circle"], "seed": 4}
    | {"decoding_steps": 20, "num_inference_steps": 3},  # more steps than tokens
)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_its_images_are_ours(alpha_set: Path, generators: Any, backend: str) -> None:
    generator = generators(backend)
    bare = Bare(str(alpha_set), backend, Meter())
    for request in REQUESTS:
        images, timings = bare.draw(request)
        ours = generator.run(**request, output_type="np")
        assert np.array_equal(images, ours.images)
        assert {"mllm", *ours.timings} <= timings.keys()  # it keeps no prompts


def test_guidance_is_computed_where_the_set_asks_for_it(
    alpha_set: Path, generators: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "guided"
    folder.mkdir()
    for file in alpha_set.iterdir():
        (folder / file.name).symlink_to(file)
    facts = manifest.read(alpha_set)
    guided = dataclasses.replace(
        facts, defaults=dataclasses.replace(facts.defaults, cfg_weight=3.0)
    )
    (folder / manifest.FILENAME).unlink()
    (folder / manifest.FILENAME).write_bytes(guided.dumps())
    request: dict[str, Any] = {"prompt": ["a red circle", "a cross"], "seed": 5}
    images, _ = Bare(str(folder), "onnxruntime", Meter()).draw(request)
    generator = generators("onnxruntime")
    assert np.array_equal(images, generator.run(**request, cfg_weight=3.0, output_type="np").images)
    assert not np.array_equal(images, generator.run(**request, output_type="np").images)


@pytest.mark.parametrize("backend", ["openvino", "openvino-bf16"])
def test_openvino_computes_as_in_the_driver(alpha_set: Path, backend: str) -> None:
    ov = pytest.importorskip("openvino")
    facts = manifest.read(alpha_set)
    spec = facts.engine("vae_decode")
    started: Any = backends.load(backend)
    driven = started.open(alpha_set, spec, facts.dimensions)._request.get_compiled_model()
    options = openvino_options(backend)
    bare = ov.Core().compile_model(alpha_set / spec.graph, "CPU", options)
    for name in driven.get_property("SUPPORTED_PROPERTIES"):
        assert bare.get_property(name) == driven.get_property(name), name


@pytest.mark.parametrize("backend", ["openvino", "openvino-bf16"])
def test_what_the_driver_refuses_is_not_run_bare(
    alpha_set: Path, tmp_path: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(processors, "here", lambda: AVX2)
    facts = manifest.read(alpha_set)
    engines = tuple(
        dataclasses.replace(spec, precision=dataclasses.replace(spec.precision, layers={"int8": 1}))
        for spec in facts.engines
    )
    (tmp_path / manifest.FILENAME).write_bytes(dataclasses.replace(facts, engines=engines).dumps())
    (tmp_path / "tokenizers").symlink_to(alpha_set / "tokenizers")
    with pytest.raises(BackendError, match="wrong int8 values on Haswell"):
        Bare(str(tmp_path), backend, Meter())


def test_what_it_cannot_run_is_said(alpha_set: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no bare run on 'tensorrt'"):
        Bare(str(alpha_set), "tensorrt", Meter())
    facts = manifest.read(alpha_set)
    about = Compiled("tensorrt-rtx", "1", ("sm89",), (), "")
    engines = tuple(dataclasses.replace(spec, compiled=about) for spec in facts.engines)
    changed = dataclasses.replace(facts, engines=engines, backend="tensorrt-rtx")
    (tmp_path / manifest.FILENAME).write_bytes(changed.dumps())
    with pytest.raises(EngineSetError, match="this set was compiled for tensorrt-rtx"):
        Bare(str(tmp_path), "onnxruntime", Meter())
