"""Builds that are cut off continue, changed ones rebuild what has changed, and no other."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from export import stage_cache
from export.engine_set import atomic_output
from export.errors import BuildError
from export.stage_cache import StageCache


def engine(folder: Path, text: str = "graph") -> list[Path]:
    files = [folder / "a.onnx", folder / "a.data"]
    for file in files:
        file.write_text(text)
    return files


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A folder with one finished engine."""
    folder = tmp_path / "older"
    folder.mkdir()
    StageCache(folder).put("a", "key", engine(folder), {"seconds": 1})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "new").mkdir()
    return tmp_path / "new"


def test_an_engine_of_the_same_key_is_the_older_sets_own_file(older: Path, folder: Path) -> None:
    record = StageCache(folder, older).get("a", "key")
    assert record is not None
    assert record.facts == {"seconds": 1}
    assert (folder / "a.data").samefile(older / "a.data")
    assert stage_cache.read(folder) == stage_cache.read(older)


def test_an_engine_of_another_key_is_not_used(older: Path, folder: Path) -> None:
    cache = StageCache(folder, older)
    assert cache.get("a", "other") is None
    assert cache.get("b", "key") is None
    assert not list(folder.glob("a.*"))


@pytest.mark.parametrize("damage", ["other", "graphs", "", None])
def test_a_damaged_file_is_not_used(older: Path, folder: Path, damage: str | None) -> None:
    file = older / "a.data"
    if damage is None:
        file.unlink()
    else:
        file.write_text(damage)
    assert StageCache(folder, older).get("a", "key") is None
    assert StageCache(older).get("a", "key") is None
    assert not list(older.glob("a.*"))


@pytest.mark.parametrize("report", ["", "{", "[]", '{"engines": {"a": {"key": 1, "files": [2]}}}'])
def test_a_report_that_cannot_be_read_is_no_report(older: Path, folder: Path, report: str) -> None:
    (older / "report.json").write_text(report)
    assert StageCache(folder, older).get("a", "key") is None


def test_a_file_outside_the_folder_is_not_used(older: Path, folder: Path) -> None:
    path = older / "report.json"
    path.write_text(path.read_text().replace("a.data", "../older/a.data"))
    assert StageCache(folder, older).get("a", "key") is None


def test_what_was_cut_off_is_deleted_and_what_was_finished_is_not(older: Path) -> None:
    (older / "b.data").write_text("half")
    (older / ".b.data.x").mkdir()
    (older / "manifest.json").write_text("of the build that was cut off")
    cache = StageCache(older)
    assert sorted(path.name for path in older.iterdir()) == ["a.data", "a.onnx", "report.json"]
    assert cache.get("a", "key") is not None


def test_a_rebuilt_engine_leaves_the_older_sets_files_alone(older: Path, folder: Path) -> None:
    assert StageCache(folder, older).get("a", "key") is not None
    again = StageCache(folder, older)  # the next build, of other code
    assert again.get("a", "other") is None
    again.put("a", "other", engine(folder, "another graph"), {})
    assert (older / "a.onnx").read_text() == "graph"


def test_an_engine_that_was_not_asked_for_yet_stays_known(older: Path) -> None:
    """Cut off twice, the second time before the stage of the first."""
    cache = StageCache(older)
    (older / "b.onnx").write_text("b")
    cache.put("b", "key", [older / "b.onnx"], {})
    assert StageCache(older).get("a", "key") is not None


def test_the_next_build_continues_in_the_folder_that_was_left(tmp_path: Path) -> None:
    left = tmp_path / ".set.partial"
    left.mkdir()
    StageCache(left).put("a", "key", engine(left, "kept"), {})
    with atomic_output(tmp_path / "set", finished=[stage_cache.REPORT]) as folder:
        assert folder == left
        assert StageCache(folder).get("a", "key") is not None
        assert (folder / "a.onnx").read_text() == "kept"
        (folder / "manifest.json").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_build_that_fails_keeps_what_it_has_finished_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "set"
    with (
        pytest.raises(RuntimeError),
        atomic_output(output, finished=[stage_cache.REPORT]) as folder,
    ):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(BuildError, match=r"disk is full; what is finished is kept in"),
        atomic_output(output, finished=[stage_cache.REPORT]) as folder,
    ):
        StageCache(folder).put("a", "key", engine(folder), {})
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(RuntimeError),
        atomic_output(output, finished=[stage_cache.REPORT]) as folder,
    ):
        assert StageCache(folder).get("a", "key") is not None
        raise RuntimeError
    assert not output.exists()
