"""Two builds of one set: the second one is refused, wherever it runs, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from export import build_lock, stage_cache
from export.engine_set import atomic_output
from export.errors import BuildError
from export.synthesize import synthesize
from export.synthetic.shapes import Shapes

ROOT = Path(__file__).parents[2]
# Writes one file into the folder of its build, says so, and ends when it is told to.
BUILD = """
import os, sys
from pathlib import Path
from export.engine_set import atomic_output
with atomic_output(Path(sys.argv[1]), finished=sys.argv[2:]) as folder:
    (folder / "manifest.json").write_text("first")
    for name in sys.argv[2:]:
        (folder / name).write_text("{}")
    print(os.getpid(), flush=True)
    sys.stdin.readline()
"""
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child")
REFUSED = "another build of this set is running"


@contextmanager
def building(
    output: Path, *finished: str, through: Sequence[str] = ()
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process in the middle of its build of `output`, and its number as it sees it."""
    process = subprocess.Popen(
        [*through, sys.executable, "-c", BUILD, str(output), *finished],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        try:
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait(timeout=60) == 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_second_build_of_a_set_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "set"
    with building(output) as (first, _):
        for finished in ((), (stage_cache.REPORT,)):
            with (
                pytest.raises(BuildError, match=REFUSED) as refused,
                atomic_output(output, finished),
            ):
                pass
            assert "wait until it has ended, or choose another --output" in str(refused.value)
        with atomic_output(tmp_path / "other") as folder:  # another set is another matter
            (folder / "manifest.json").write_text("other")
        end(first)
    assert (output / "manifest.json").read_text() == "first"
    assert names(tmp_path) == ["other", "set"]


def test_two_builds_in_containers_of_their_own_are_both_process_1(tmp_path: Path) -> None:
    if shutil.which(NAMESPACE[0]) is None:
        pytest.skip("this machine has no `unshare`")
    if subprocess.run([*NAMESPACE, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not make process namespaces")
    output = tmp_path / "set"
    with building(output, through=NAMESPACE) as (first, number):
        assert number == "1"
        second = subprocess.run(
            [*NAMESPACE, sys.executable, "-c", BUILD, str(output)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert second.returncode == 1
        assert f"export.errors.BuildError: {output}: {REFUSED}" in second.stderr
        end(first)
    assert (output / "manifest.json").read_text() == "first"
    assert names(tmp_path) == ["set"]


def test_a_build_that_was_killed_locks_nobody_out_and_is_continued(tmp_path: Path) -> None:
    output = tmp_path / "set"
    with building(output, stage_cache.REPORT) as (first, _):
        first.kill()
        first.wait(timeout=60)
        with atomic_output(output, (stage_cache.REPORT,)) as folder:
            assert (folder / "manifest.json").read_text() == "first"
    assert names(tmp_path) == ["set"]


def test_a_lock_that_its_last_holder_has_removed_is_not_taken_for_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ends between this one's opening of the file and its locking."""
    path, lock, removed = tmp_path / ".set.lock", build_lock._lock, []

    def late(descriptor: int) -> None:
        if not removed:
            removed.append(path.unlink())
        lock(descriptor)

    monkeypatch.setattr(build_lock, "_lock", late)
    with build_lock.alone(tmp_path / "set", path):
        assert removed
        with pytest.raises(BuildError, match=REFUSED), build_lock.alone(tmp_path / "set", path):
            pass
    assert names(tmp_path) == []


def test_what_else_is_atomic_output_has_a_lock_too(tmp_path: Path) -> None:
    """A random checkpoint. The one that is being written stays as it is."""
    (tmp_path / ".ckpt.partial").mkdir()
    with (
        build_lock.alone(tmp_path / "ckpt", tmp_path / ".ckpt.lock"),
        pytest.raises(BuildError, match="another build of this checkpoint is running"),
    ):
        synthesize(Shapes(), tmp_path / "ckpt")
    assert names(tmp_path) == [".ckpt.partial"]


def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(build_lock, "_lock", none)
    with (
        pytest.raises(BuildError, match=r"has no locks \(No locks available\)") as refused,
        atomic_output(tmp_path / "set"),
    ):
        pass
    assert refused.value.hint is not None
    assert "on another disk" in refused.value.hint


def test_a_set_behind_a_link_is_replaced_where_it_lies(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "big").mkdir(parents=True)
    (disk / "big" / "manifest.json").write_text("older")
    (tmp_path / "set").symlink_to(disk / "big")
    with atomic_output(tmp_path / "set") as folder:
        assert folder.parent == disk
        with pytest.raises(BuildError, match=REFUSED), atomic_output(disk / "big"):
            pass
        (folder / "manifest.json").write_text("newer")
    assert (tmp_path / "set").is_symlink()
    assert (disk / "big" / "manifest.json").read_text() == "newer"
    assert (names(tmp_path), names(disk)) == (["disk", "set"], ["big"])


def test_a_set_whose_name_is_as_long_as_names_can_be(tmp_path: Path) -> None:
    for name in ("s" * 255, "ß" * 127):
        with atomic_output(tmp_path / name) as folder:
            (folder / "manifest.json").write_text("new")
        assert names(tmp_path) == [name]
        shutil.rmtree(tmp_path / name)


def test_the_folder_of_one_set_is_not_taken_for_that_of_another(tmp_path: Path) -> None:
    """Whose names begin alike."""
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_output(tmp_path / "set.b", (stage_cache.REPORT,)) as folder,
    ):
        (folder / stage_cache.REPORT).write_text("{}")
        raise KeyboardInterrupt
    with atomic_output(tmp_path / "set", (stage_cache.REPORT,)) as folder:
        assert names(folder) == []
        (folder / "manifest.json").write_text("new")
    assert names(tmp_path) == [".set.b.partial", "set"]


def test_a_mount_point_is_refused_before_anything_is_built() -> None:
    if not Path("/proc").is_mount():
        pytest.skip("needs a mount point")
    with (
        pytest.raises(BuildError, match="is where a disk is mounted") as refused,
        atomic_output(Path("/proc")),
    ):
        pass
    assert refused.value.hint == "choose a folder on it, such as --output /proc/set"
