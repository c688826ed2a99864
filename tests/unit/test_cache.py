"""The cache folder: safe to share, to damage and to delete."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from bifrost_rt import cache


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "things"


@pytest.mark.parametrize(
    ("environment", "platform", "expected"),
    [
        ({"BIFROST_CACHE": "/x/y"}, "linux", Path("/x/y")),
        ({"XDG_CACHE_HOME": "/c"}, "linux", Path("/c/bifrost-rt")),
        ({}, "linux", Path.home() / ".cache/bifrost-rt"),
        ({}, "darwin", Path.home() / "Library/Caches/bifrost-rt"),
        ({"LOCALAPPDATA": "/local"}, "win32", Path("/local/bifrost-rt")),
        ({}, "win32", Path.home() / "AppData/Local/bifrost-rt"),
    ],
)
def test_the_folder_is_where_the_system_keeps_caches(
    environment: dict[str, str], platform: str, expected: Path
) -> None:
    assert cache.folder(environment, platform) == expected


def test_what_was_kept_comes_back_until_the_folder_is_deleted(place: Path) -> None:
    assert cache.read("things", "key") is None
    assert cache.write("things", "key", b"content") is None
    assert cache.read("things", "key") == b"content"
    assert [path.name for path in place.iterdir()] == ["key"]
    shutil.rmtree(place)
    assert cache.read("things", "key") is None


@pytest.mark.parametrize("damage", [b"", b"x", b"\0" * 32, b"\0" * 40])
def test_what_is_damaged_counts_as_absent(place: Path, damage: bytes) -> None:
    cache.write("things", "key", b"content")
    (place / "key").write_bytes(damage)
    assert cache.read("things", "key") is None
    cache.write("things", "key", b"content")
    assert cache.read("things", "key") == b"content"


def test_a_folder_that_cannot_be_written_is_a_reason_and_no_error(place: Path) -> None:
    place.parent.write_text("a file, where the folder would be")
    assert cache.read("things", "key") is None
    assert str(place) in (cache.write("things", "key", b"content") or "")


def test_many_writers_leave_one_whole_file(place: Path) -> None:
    contents = [bytes([i]) * 100_000 for i in range(8)]
    writers = [
        threading.Thread(target=lambda c=c: [cache.write("things", "key", c) for _ in range(20)])
        for c in contents
    ]
    for writer in writers:
        writer.start()
    found = {cache.read("things", "key") for _ in range(100)} - {None}
    for writer in writers:
        writer.join()
    assert found <= set(contents)
    assert cache.read("things", "key") in contents
    assert [path.name for path in place.iterdir()] == ["key"]


def test_what_nobody_reads_for_a_month_is_dropped(place: Path) -> None:
    for name in ("old", "used"):
        cache.write("things", name, b"content")
        long_ago = time.time() - cache.UNUSED_SECONDS - 60
        os.utime(place / name, (long_ago, long_ago))
    assert cache.read("things", "used") == b"content"
    cache.write("things", "new", b"content")
    assert sorted(path.name for path in place.iterdir()) == ["new", "used"]
