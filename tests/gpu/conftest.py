"""Checks that need a GPU; on a machine without one each is skipped with the driver's reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bifrost_rt import backends

GPU_DRIVERS = [name for name, driver in backends.DRIVERS.items() if driver.gpu]


@pytest.fixture(params=GPU_DRIVERS)
def name(request: pytest.FixtureRequest) -> str:
    if reason := backends.DRIVERS[request.param].unavailable():
        pytest.skip(f"{request.param}: {reason}")
    return str(request.param)


@pytest.fixture
def folder(name: str, set_for: Any) -> Path:
    found: Path = set_for(name)
    return found
