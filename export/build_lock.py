"""One build of a set at a time, whatever machine or container it runs in.

Process numbers mean nothing across containers, where each build may be process 1, so the lock is
the operating system's own, on a hidden file beside the set. It ends with the process that holds it:
what a killed build leaves behind locks nobody out.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from export.errors import BuildError

if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def alone(output: Path, path: Path, what: str = "set") -> Iterator[None]:
    """Hold the lock of `output` by the file `path`, which is gone afterwards.

    Args:
        what: is built there, for the error.

    Raises:
        BuildError: another process holds it, or the disk has no locks.
        OSError: the file cannot be made.
    """
    descriptor = _acquire(output, path, what)
    try:
        yield
    finally:
        # While it is still locked: whoever opened it meanwhile finds that it is not the file that
        # is there now. Windows does not remove what is open.
        if sys.platform != "win32":
            path.unlink(missing_ok=True)
        os.close(descriptor)
        if sys.platform == "win32":
            with contextlib.suppress(OSError):
                path.unlink()


def _acquire(output: Path, path: Path, what: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            if sys.platform == "win32" or _is_there(descriptor, path):
                return descriptor
        except (BlockingIOError, PermissionError):  # as POSIX and as Windows say it
            os.close(descriptor)
            raise BuildError(
                f"{output}: another build of this {what} is running",
                hint="wait until it has ended, or choose another --output",
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise BuildError(
                f"{output}: the disk of {path.parent} has no locks ({error.strerror}), so two "
                f"builds of one {what} could not be told apart",
                hint=f"choose an --output on another disk, and copy the {what} when it is built",
            ) from error
        os.close(descriptor)


def _is_there(descriptor: int, path: Path) -> bool:
    """Say whether the file is the one at `path`: its last holder may have removed it before this
    process got the lock."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
