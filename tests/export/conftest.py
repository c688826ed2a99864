"""What the tests of compiling share: a small set, its engines, and how a set is changed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bifrost_rt import manifest
from bifrost_rt.manifest import Manifest
from export.compile.compiled_set import compile_set
from export.engine_set import describe_files
from export.plan import works_of_shapes
from export.planning.work import Work
from export.synthesize import synthesize
from export.synthetic.shapes import Shapes
from tests.export.checkpoints import opened, outline

SMALL = ("clip_text", "t5_text")
TARGETS = ("sm89", "rtx-5090")


def rewritten(folder: Path, change: Callable[[Manifest], Manifest]) -> Path:
    """Seal a set again after a change to it."""
    facts = change(manifest.read(folder))
    facts = dataclasses.replace(facts, files=describe_files(folder))
    (folder / manifest.FILENAME).write_bytes(facts.dumps())
    return folder


def holding(m: Manifest, **precision: str) -> Manifest:
    """The manifest of a set whose engines say something else of their precision."""
    engines = []
    for spec in m.engines:
        changed = dataclasses.replace(spec.precision, **precision)
        engines.append(dataclasses.replace(spec, precision=changed))
    return dataclasses.replace(m, engines=tuple(engines))


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and its sha256."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): manifest.sha256(path) for path in files}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint of one file a network, as `python -m export.synthesize` writes it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    synthesize(Shapes(), folder)
    return folder


@pytest.fixture
def root(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    shutil.copytree(tiny, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(scope="session")
def tiny_outline(tiny: Path) -> dict[str, Any]:
    """What is read of it."""
    return outline(opened(tiny))


@pytest.fixture(scope="session")
def release() -> list[Work]:
    """The engines of the 7B MLLM with FLUX.1-dev, as the planner counts them."""
    return works_of_shapes("7b")


@pytest.fixture(scope="module")
def small_set(alpha_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two engines of seven: they compile in half a second."""
    folder = tmp_path_factory.mktemp("sets") / "small"
    folder.mkdir()
    for name in ("tokenizers", "report.json", manifest.FILENAME, *(f"{n}.onnx" for n in SMALL)):
        copy = shutil.copytree if (alpha_set / name).is_dir() else shutil.copyfile
        copy(alpha_set / name, folder / name)
    for name in SMALL:
        shutil.copyfile(alpha_set / f"{name}.data", folder / f"{name}.data")
    return rewritten(
        folder,
        lambda m: dataclasses.replace(m, engines=tuple(e for e in m.engines if e.name in SMALL)),
    )


@pytest.fixture(scope="module")
def compiled(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its engines."""
    output = tmp_path_factory.mktemp("compiled") / "rtx"
    return compile_set(small_set, output, targets=TARGETS, max_images=2)
