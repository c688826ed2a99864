"""Checks that need a GPU; on a machine without one each is skipped with the backend's reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bifrost_rt import backends

GPU_BACKENDS = [name for name, backend in backends.BACKENDS.items() if backend.gpu]


@pytest.fixture(params=GPU_BACKENDS)
def name(request: pytest.FixtureRequest) -> str:
    if reason := backends.BACKENDS[request.param].unavailable():
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.fixture
def folder(name: str, set_for: Any) -> Path:
    found: Path = set_for(name)
    return found
