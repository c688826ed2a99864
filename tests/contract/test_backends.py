"""What every backend must do: one suite, run against each that is installed here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bifrost_rt import EngineInputError, backends, manifest
from bifrost_rt.backends.base import Backend, Engine
from bifrost_rt.errors import BackendError
from tests.conftest import difference, load_case


@pytest.fixture(params=sorted(backends.BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    if reason := backends.BACKENDS[request.param].unavailable():
        pytest.skip(f"{request.param}: {reason}")
    return backends.load(request.param)


@pytest.fixture
def folder(backend: Backend, set_for: Callable[[str], Path]) -> Path:
    return set_for(backend.name)


@pytest.fixture
def engine(backend: Backend, folder: Path) -> Iterator[Engine]:
    facts = manifest.read(folder)
    opened = backend.open(folder, facts.engine("t5_text"), facts.dimensions)
    yield opened
    opened.close()


def allowed(backend: Backend) -> float:
    """Of values up to 4: the backend whose name says bf16 rounds every operation; measured 0.05."""
    return 0.2 if backend.name.endswith("-bf16") else 1e-4


def inputs(backend: Backend) -> tuple[dict[str, Any], np.ndarray]:
    case = load_case("case_04")
    ids = case.tensors["flux.t5_input_ids"].astype(np.int64)
    return {"input_ids": backend.upload(ids)}, case.tensors["flux.prompt_embeds"]


def test_a_bound_call_reads_and_writes_its_buffers(backend: Backend, engine: Engine) -> None:
    given, expected = inputs(backend)
    out = backend.empty(expected.shape, np.float32)
    call = engine.bind(given, {"prompt_embeds": out})
    call()
    assert difference(backend.download(out), expected) < allowed(backend)
    swapped = backend.download(given["input_ids"])[::-1].copy()
    backend.write(given["input_ids"], swapped)
    call()
    assert difference(backend.download(out), expected[::-1]) < allowed(backend)


def test_buffers_outlive_the_callers_names(backend: Backend, engine: Engine) -> None:
    """A call keeps what it is bound to alive; only the output is still held here."""
    given, expected = inputs(backend)
    out = backend.empty(expected.shape, np.float32)
    call = engine.bind(given, {"prompt_embeds": out})
    del given
    junk = [np.full((4, 32), 7, np.int64) for _ in range(100)]
    call()
    assert difference(backend.download(out), expected) < allowed(backend)
    assert len(junk) == 100


@pytest.mark.parametrize(
    ("shape", "dtype"), [((2, 31), np.int64), ((2, 32), np.int32), ((32,), np.int64)]
)
def test_what_does_not_fit_is_refused(
    backend: Backend, engine: Engine, shape: tuple[int, ...], dtype: type
) -> None:
    out = backend.empty((2, 32, 48), np.float32)
    with pytest.raises(EngineInputError, match="engine `t5_text`, input `input_ids`"):
        engine.bind({"input_ids": backend.upload(np.zeros(shape, dtype))}, {"prompt_embeds": out})


def test_a_closed_engine_says_so(backend: Backend, engine: Engine) -> None:
    given, expected = inputs(backend)
    engine.close()
    with pytest.raises(BackendError, match="`t5_text` is closed"):
        engine.bind(given, {"prompt_embeds": backend.empty(expected.shape, np.float32)})


def test_a_foreign_file_is_one_clear_error(backend: Backend, folder: Path, tmp_path: Path) -> None:
    facts = manifest.read(folder)
    spec = facts.engine("t5_text")
    (tmp_path / spec.graph).write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=re.escape(spec.graph)):
        backend.open(tmp_path, spec, facts.dimensions)
