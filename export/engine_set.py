"""A set appears only when it is complete: it is written aside and renamed.

A build that fails or is interrupted leaves nothing behind and an older set untouched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from bifrost_rt import manifest as manifests
from bifrost_rt.manifest import File
from export.errors import BuildError

# With less than this left, a write that failed without a reason failed for want of space.
LITTLE = 16 << 20


@contextlib.contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """A folder to build in; on success it takes the place of `output`.

    Raises:
        BuildError: `output` is something other than an engine set, the disk is full, or a file
            cannot be read or written.
    """
    output = output.absolute()
    aside = _aside(output, os.getpid())
    try:
        _refuse_foreign(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(output)
        aside.mkdir()
        with _terminated_like_interrupted():
            yield aside
            _replace(output, aside)
    except OSError as error:
        if _disk_full(output.parent, error):
            raise BuildError(
                f"{output}: the disk is full; nothing was kept",
                hint=f"free some space on the disk of {output.parent}",
            ) from error
        raise BuildError(f"{output}: cannot be built: {error}; nothing was kept") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def describe_files(folder: Path) -> dict[str, File]:
    """Every file of a set, for its manifest."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): File(path.stat().st_size, manifests.sha256(path))
        for path in found
        if path.name != manifests.FILENAME
    }


def _disk_full(folder: Path, error: OSError) -> bool:
    if error.errno is None:  # numpy's writer forgets the reason
        return shutil.disk_usage(folder).free < LITTLE
    return error.errno == errno.ENOSPC


def _aside(output: Path, pid: int) -> Path:
    return output.with_name(f".{output.name}.{pid}.partial")


def _previous(output: Path) -> Path:
    return output.with_name(f".{output.name}.previous")


def _refuse_foreign(output: Path) -> None:
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not (output / manifests.FILENAME).is_file():
        raise BuildError(
            f"{output}: exists and is not an engine set; it will not be overwritten",
            hint="choose another --output, or remove it yourself",
        )


def _clean_up(output: Path) -> None:
    """After builds that were killed: drop what they wrote, put back what they had moved."""
    previous = _previous(output)
    if previous.exists():
        if output.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(output)
    for partial in output.parent.glob(f".{output.name}.*.partial"):
        pid = partial.name.split(".")[-2]
        if not (pid.isdigit() and _alive(int(pid))):
            shutil.rmtree(partial, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _replace(output: Path, aside: Path) -> None:
    previous = _previous(output)
    if output.exists():
        output.rename(previous)
    try:
        aside.rename(output)
    except BaseException:
        if previous.exists():
            previous.rename(output)
        raise
    shutil.rmtree(previous, ignore_errors=True)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does, so that it leaves no half set either."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
