"""What tests share: the golden data, and a set built from its checkpoint once per run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from numpy.typing import NDArray

from benchmarks import golden
from benchmarks.golden import Case

ALPHA = Path(__file__).parent / "golden" / "alpha"


CASES = [f"case_{i:02d}" for i in range(8)]


def load_case(name: str) -> Case:
    return golden.load(ALPHA, name)


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return load_case(request.param)


@pytest.fixture(scope="session")
def alpha_set(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """The golden checkpoint at fp32, built as a user builds it, by the first process that needs
    it."""
    if (built := pytestconfig.getoption("--alpha-set")) is not None:
        return Path(built)
    from export.build import build

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    output = folder / "alpha"
    with FileLock(folder / "alpha.lock"):
        if not output.exists():
            build(alpha_recipe(output), None)
    return output


def alpha_recipe(output: Path, **changes: Any) -> Any:
    from export.recipe import Recipe

    folders = {name: str(ALPHA / name) for name in ("mllm", "bifrost", "flux")}
    lengths = {"mllm_max_length": 48, "t5_max_length": 32}
    return Recipe(**{**folders, **lengths, "output": str(output), **changes})


@pytest.fixture(scope="session")
def generator(alpha_set: Path) -> Iterator[Any]:
    """The set, opened on the backend that it was built for. It keeps no prompts: what a test sees
    does not depend on those before it."""
    from bifrost_rt import Generator

    with Generator(alpha_set, prompt_cache=0) as opened:
        yield opened


@pytest.fixture(scope="session")
def set_for(alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The set as a backend runs it: `set_for("tensorrt-rtx")` is compiled for this machine's
    GPU."""
    from bifrost_rt import backends

    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if not backends.BACKENDS[name].compiled:
            return alpha_set
        if name not in made:
            from export.compile.compiled_set import compile_set

            output = tmp_path_factory.mktemp("compiled") / name
            made[name] = compile_set(alpha_set, output, backend=name, max_images=4, max_steps=64)
        return made[name]

    return of


@pytest.fixture(scope="session")
def generators(set_for: Any) -> Iterator[Any]:
    """The set, opened on any backend: `generators("openvino")`. Skips where it is not installed."""
    from bifrost_rt import Generator, backends

    opened: dict[str, Any] = {}

    def on(name: str) -> Any:
        if reason := backends.BACKENDS[name].unavailable():
            pytest.skip(f"{name}: {reason}")
        if name not in opened:
            opened[name] = Generator(set_for(name), backend=name)
        return opened[name]

    yield on
    for generator in opened.values():
        generator.close()


def difference(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest absolute difference, in float64. Shapes must agree: nothing is broadcast."""
    assert found.shape == expected.shape
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alpha-set", metavar="DIR", help="the golden set, built beforehand")
    parser.addoption("--screenshots", metavar="DIR", help="keep what browser tests looked like")
