"""A set whose files are links is compiled, and rebuilt with files of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from bifrost_rt import manifest
from export import build, stage_cache
from export.compile.compiled_set import compile_set
from export.stage_cache import StageCache
from tests.conftest import alpha_recipe
from tests.export.conftest import TARGETS
from tests.linked_layouts import LAYOUTS, Layout, as_a_hub


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linked_set_compiles(small_set: Path, layout: Layout, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    source = layout(small_set, tmp_path / "links")
    for weights in ("baked", "bound"):
        output = compile_set(
            source, tmp_path / weights, targets=TARGETS, max_images=1, weights=weights
        )
        straight = compile_set(
            small_set, tmp_path / "straight", targets=TARGETS, max_images=1, weights=weights
        )
        assert manifest.read(output).files.keys() == manifest.read(straight).files.keys()
        for path in sorted(straight.glob("*.weights")):
            assert (output / path.name).read_bytes() == path.read_bytes()
        assert not [path for path in output.rglob("*") if path.is_symlink()]


def test_a_linked_set_is_rebuilt_with_files_of_its_own(alpha_set: Path, tmp_path: Path) -> None:
    output = as_a_hub(alpha_set, tmp_path)
    said: list[str] = []
    build.build(alpha_recipe(output), said.append)
    assert "denoise is there already" in said
    assert not any(line.startswith("building") for line in said)
    assert not [path for path in output.rglob("*") if path.is_symlink()]
    facts = manifest.read(output)
    assert facts.files["denoise.data"] == manifest.read(alpha_set).files["denoise.data"]


def test_an_engine_behind_links_is_taken_over_as_the_files_themselves(tmp_path: Path) -> None:
    older, blobs, new = tmp_path / "older", tmp_path / "blobs", tmp_path / "deep" / "new"
    for folder in (older, blobs, new):
        folder.mkdir(parents=True)
    cache = StageCache(older)
    files = [older / "a.onnx", older / "a.data"]
    for file in files:
        file.write_text(file.name)
    cache.put("a", "key", files, {})
    for file in files:
        file.rename(blobs / file.name)
        file.symlink_to(Path("..", "blobs", file.name))
    assert StageCache(new, older).get("a", "key") is not None
    for file in files:
        taken = new / file.name
        assert not taken.is_symlink()
        assert taken.samefile(blobs / file.name)
    assert stage_cache.read(new) == stage_cache.read(older)
