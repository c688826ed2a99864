"""No module needs itself, not even for a type, and few files know an engine by its name."""

from __future__ import annotations

import ast
import functools
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from export.stages.catalog import DEFINITIONS

ROOT = Path(__file__).parents[2]
PACKAGES = ("bifrost_rt", "export", "benchmarks", "scenes", "training", "tools")
# Its own file, the catalog, what makes it of a checkpoint, the pipeline and what that is made of.
# What calls engines: to draw, and to look.
CALLERS = {"bifrost_rt/pipeline.py", "bifrost_rt/vision.py", "bifrost_rt/image_latents.py"}
MOST_FILES = 6


def modules() -> dict[str, Path]:
    """Name -> file, of everything that is ours."""
    found = {}
    for path in (p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    """What says something of names: imports and constants."""
    kinds = (ast.Import, ast.ImportFrom, ast.Constant)
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]


def imported(source: str, known: set[str]) -> set[str]:
    """Which of the known modules a module imports, wherever it does."""
    found: set[str] = set()
    for node in nodes(source):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            assert node.module
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known
            if not names <= known:
                found.add(node.module)
    return found & known


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, in order; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        names: list[str] = error.args[1]
        return names[::-1]
    return []


def test_no_import_leads_back() -> None:
    there = modules()
    assert len(there) > 150
    graph = {name: imported(path.read_text(), set(there)) - {name} for name, path in there.items()}
    found = circle(graph)
    assert not found, "a circle of imports: " + " -> ".join(found)


def test_a_circle_is_named() -> None:
    sources = {
        "a": "from b import x",
        "b": "def f():\n    import c.d",
        "c.d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import y",
        "e": "import a",
    }
    graph = {name: imported(source, set(sources)) for name, source in sources.items()}
    found = circle(graph)
    assert len(found) == 4
    assert "a b c.d a" in " ".join([*found, *found[1:]])


def literals(source: str) -> set[str]:
    """Names of modules that are imported, and texts without their prose: whole strings alone."""
    found = set()
    for node in nodes(source):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(alias.name for alias in node.names)}
    return found


@pytest.mark.parametrize("engine", DEFINITIONS)
def test_an_engine_is_named_where_it_is_declared_and_where_it_is_called(engine: str) -> None:
    files = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for package in ("bifrost_rt", "export")
        for path in (ROOT / package).rglob("*.py")
    }
    naming = {name for name, source in files.items() if engine in literals(source)}
    assert f"export/stages/{engine}.py" in naming
    assert naming & CALLERS
    if "_" in engine:  # where it is no ordinary word, comments count too
        naming |= {name for name, text in files.items() if re.search(rf"\b{engine}\b", text)}
    assert len(naming) <= MOST_FILES, sorted(naming)
