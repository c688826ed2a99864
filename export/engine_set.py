"""A set appears only when it is complete: it is written aside and renamed.

A build that fails or is cut off leaves an older set untouched, and nothing else behind but the
engines that it has finished, for the next build of the same set. A second build of a set that is
being built is refused at once (`build_lock`).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from bifrost_rt import manifest as manifests
from bifrost_rt.manifest import File
from export import build_lock
from export.errors import BuildError

# With less than this left, a write that failed without a reason failed for want of space.
LITTLE = 16 << 20
# Bytes of a name that others can be made from: disks take 255, or 143 where names are encrypted.
LONGEST_NAME = 120


@contextlib.contextmanager
def atomic_output(output: Path, finished: Sequence[str] = ()) -> Iterator[Path]:
    """Return a folder to build in; on success it takes the place of `output`, or of the folder that
    `output` is a link to.

    Args:
        finished: names of files that hold what is finished. A folder that has one of them outlives
            a failure, and the next build of the set continues in it.

    Raises:
        BuildError: `output` is something other than an engine set, another build of it is running,
            the disk is full, or a file cannot be read or written.
    """
    output = Path(os.path.realpath(output))
    aside = hidden(output, "partial")
    locked = contextlib.ExitStack()
    try:
        _refuse_foreign(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        locked.enter_context(build_lock.alone(output, hidden(output, "lock")))
        _put_back(output)
        if not finished:
            _remove(aside)
        with _terminated_like_interrupted():
            aside.mkdir(exist_ok=bool(finished))
            try:
                yield aside
                _replace(output, aside)
            finally:
                if not _holds(aside, finished):
                    shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if _disk_full(output.parent, error):
            raise BuildError(
                f"{output}: the disk is full; {_kept(aside, finished)}",
                hint=f"free some space on the disk of {output.parent}",
            ) from error
        raise BuildError(f"{output}: cannot be built: {error}; {_kept(aside, finished)}") from error
    finally:
        locked.close()


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


def hidden(output: Path, kind: str) -> Path:
    """Return the name beside a set of what belongs to its builds. A long name is shortened to its
    hash, so that whatever can be called `output` has one."""
    name = output.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return output.with_name(f".{name}.{kind}")


def _refuse_foreign(output: Path) -> None:
    if output.is_mount():
        raise BuildError(
            f"{output}: is where a disk is mounted, which no new folder can take the place of",
            hint=f"choose a folder on it, such as --output {output / 'set'}",
        )
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() and not (output / manifests.FILENAME).is_file():
        raise BuildError(
            f"{output}: exists and is not an engine set; it will not be overwritten",
            hint="choose another --output, or remove it yourself",
        )


def _put_back(output: Path) -> None:
    """Put back what a build had moved that was killed while the new set took the older one's
    place."""
    previous = hidden(output, "previous")
    if previous.exists():
        if output.exists():
            _remove(previous)
        else:
            previous.rename(output)


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def _replace(output: Path, aside: Path) -> None:
    previous = hidden(output, "previous")
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
