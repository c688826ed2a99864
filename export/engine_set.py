"""A set appears only when it is complete: it is written aside and renamed.

A build that fails or is cut off leaves an older set untouched, and nothing else behind but the
engines that it has finished, for the next build of the same set.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from bifrost_rt import manifest as manifests
from bifrost_rt.manifest import File
from export.errors import BuildError

# With less than this left, a write that failed without a reason failed for want of space.
LITTLE = 16 << 20


@contextlib.contextmanager
def written_aside(output: Path, finished: Sequence[str] = ()) -> Iterator[Path]:
    """A folder to build in; on success it takes the place of `output`.

    Args:
        finished: names of files that hold what is finished. A folder that has one of them outlives
            a failure, and the next build of the set continues in it.

    Raises:
        BuildError: `output` is something other than an engine set, the disk is full, or a file
            cannot be read or written.
    """
    output = output.absolute()
    aside = _aside(output, os.getpid())
    try:
        _refuse_foreign(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(output, aside if finished else None)
        aside.mkdir(exist_ok=bool(finished))
        with _terminated_like_interrupted():
            yield aside
            _replace(output, aside)
    except OSError as error:
        if _disk_full(output.parent, error):
            raise BuildError(
                f"{output}: the disk is full; {_kept(aside, finished)}",
                hint=f"free some space on the disk of {output.parent}",
            ) from error
        raise BuildError(f"{output}: cannot be built: {error}; {_kept(aside, finished)}") from error
    finally:
        if not _holds(aside, finished):
            shutil.rmtree(aside, ignore_errors=True)


def describe_files(folder: Path, known: Mapping[str, File] | None = None) -> dict[str, File]:
    """Every file of a set, for its manifest; `known` ones are not read again."""
    known = known or {}
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        name: known.get(name) or File(path.stat().st_size, manifests.sha256(path))
        for path in found
        if (name := path.relative_to(folder).as_posix()) != manifests.FILENAME
    }


def _holds(aside: Path, finished: Sequence[str]) -> bool:
    return any((aside / name).is_file() for name in finished)


def _kept(aside: Path, finished: Sequence[str]) -> str:
    if _holds(aside, finished):
        return f"what is finished is kept in {aside}"
    return "nothing was kept"


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


def _clean_up(output: Path, aside: Path | None) -> None:
    """After builds that were cut off: put back what they had moved, and drop what they wrote, or
    continue in the latest as `aside`."""
    previous = _previous(output)
    if previous.exists():
        if output.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(output)
    left = [
        partial
        for partial in output.parent.glob(f".{output.name}.*.partial")
        if not ((pid := partial.name.split(".")[-2]).isdigit() and _alive(int(pid)))
    ]
    left.sort(key=lambda partial: partial.stat().st_mtime_ns)
    latest = left.pop() if left and aside is not None else None
    for partial in left:
        shutil.rmtree(partial, ignore_errors=True)
    if latest is not None and aside is not None:
        latest.rename(aside)


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
