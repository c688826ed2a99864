"""What only a GPU can show: graphs against none, steps without the host, 16 bit, weights outside.

Parity with the recordings on every GPU backend is `tests/end_to_end/test_golden_cases.py`, the
backends' contract `tests/contract/test_backends.py`; `make gpu-checks` runs them all, and times
steps at true widths (`benchmarks.gpu`).
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bifrost_rt import Generator, backends
from bifrost_rt.backends.cuda import Cuda
from export.compile.compiled_set import compile_set
from tests.conftest import difference, load_case

pytestmark = pytest.mark.gpu

REQUEST: dict[str, Any] = {"prompt": "a red square", "seed": 0, "output_type": "np"}


def test_graphs_change_nothing_in_the_image(name: str, folder: Path) -> None:
    results = []
    for replayed in (True, False):
        backend: Any = backends.load(name)
        backend.graphs = replayed
        with Generator(folder, backend=backend) as generator:
            for _ in range(2):  # the second again replays what the first one recorded
                results.append(generator.run(**REQUEST, num_inference_steps=8))
        assert getattr(backend, "eager", {}) == {}, "steps could not be replayed"
    for again in results[1:]:
        assert np.array_equal(again.latents, results[0].latents)
        assert np.array_equal(again.images, results[0].images)


def test_a_step_calls_nothing_but_its_launch(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace of every call to CUDA that this process makes itself: for twelve more steps, twelve
    launches more and not one wait, copy or allocation."""
    if not backends.BACKENDS[name].compiled:
        pytest.skip(f"{name} calls CUDA itself")
    calls: collections.Counter[str] = collections.Counter()
    whole = Cuda._call

    def traced(cuda: Cuda, function: str, *arguments: Any, **options: Any) -> Any:
        calls[function] += 1
        return whole(cuda, function, *arguments, **options)

    monkeypatch.setattr(Cuda, "_call", traced)
    found = []
    with Generator(folder, backend=name) as generator:
        for steps in (4, 4, 16, 16):  # the first of each pair has new sizes
            calls.clear()
            generator.run(**REQUEST, decoding_steps=4, num_inference_steps=steps)
            found.append(dict(calls))
    first, second = found[1], found[3]
    more = {key: second[key] - first.get(key, 0) for key in second if second[key] != first.get(key)}
    assert more in ({}, {"cudaGraphLaunch": 12})  # the library may launch its own graphs


@pytest.mark.parametrize(
    ("compute", "allowed"), [("fp16", 0.01), ("bf16", 0.08)], ids=["fp16", "bf16"]
)
def test_16_bit_stays_near_the_recordings(
    name: str, alpha_set: Path, tmp_path: Path, compute: str, allowed: float
) -> None:
    """Through both loops; three times what the simulation on a CPU differs."""
    if not backends.BACKENDS[name].compiled:
        pytest.skip(f"{name} runs float32 graphs")
    output = compile_set(alpha_set, tmp_path / "rtx", backend=name, max_images=4, compute=compute)
    case = load_case("case_04")
    with Generator(output) as generator:
        result = generator.run(**case.request(), output_type="np")
    assert difference(result.latents, case.tensors["flux.latents_steps"][-1]) < allowed


def test_weights_outside_the_engine_are_the_same_weights(
    name: str, alpha_set: Path, folder: Path, tmp_path: Path
) -> None:
    if not backends.BACKENDS[name].compiled:
        pytest.skip(f"{name} runs ONNX graphs")
    output = compile_set(
        alpha_set, tmp_path / "rtx", backend=name, max_images=4, max_steps=64, weights="bound"
    )
    found = []
    for path in (folder, output):
        with Generator(path) as generator:
            found.append(generator.run(**REQUEST, num_inference_steps=8))
    assert difference(found[0].latents, found[1].latents) < 1e-4
