"""An engine is declared once: what is said of it stands in its own file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import bifrost_rt
import export
from export.stages import catalog

PACKAGES = [Path(package.__file__).parent for package in (bifrost_rt, export)]
# The pipeline that calls engines, its glimpse into the middle of a run, and what drawing and
# answering have in common.
CALLERS = {"bifrost_rt/pipeline.py", "bifrost_rt/previews.py", "bifrost_rt/text_inputs.py"}
CALLERS |= {"bifrost_rt/vision.py", "bifrost_rt/image_latents.py"}
# Which engines there are, and what their modules are made of.
LISTS = {"export/stages/catalog.py", "export/assemble.py"}


SOURCES = {
    path.relative_to(package.parent).as_posix(): path.read_text()
    for package in PACKAGES
    for path in package.rglob("*.py")
}


def imports(source: str, name: str) -> bool:
    froms = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return any(
        node.module == f"export.stages.{name}"
        or (node.module == "export.stages" and name in [alias.name for alias in node.names])
        for node in froms
    )


@pytest.mark.parametrize("name", catalog.DEFINITIONS)
def test_an_engine_is_named_in_its_own_file_and_in_the_pipeline(name: str) -> None:
    named = {file for file, text in SOURCES.items() if re.search(rf"[\"'`]{name}[\"'`]", text)}
    assert named - CALLERS == {f"export/stages/{name}.py"}


@pytest.mark.parametrize("name", catalog.DEFINITIONS)
def test_two_lists_import_an_engine(name: str) -> None:
    importing = {file for file, text in SOURCES.items() if imports(text, name)}
    assert importing >= LISTS
    assert all(file.startswith("export/stages/") for file in importing - LISTS)
