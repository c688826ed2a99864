"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from bifrost_rt.errors import RequestError


@contextlib.contextmanager
def written_aside(target: Path, keep: bool = True) -> Iterator[Path]:
    """A file to write that takes the place of `target`, or of the file that `target` is a link to,
    when it is complete. Its own name is short whatever the target's is.

    Args:
        keep: False only tries that the folder takes a file, before work is spent on its content.

    Raises:
        RequestError: the file cannot be written.
    """
    place = Path(os.path.realpath(target))
    aside = place.with_name(f".bifrost-rt.{secrets.token_hex(8)}.tmp")
    try:
        refuse_others(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        if keep:
            aside.replace(place)
    except OSError as error:
        raise RequestError(
            f"{target}: cannot be written: {error.strerror or error}", hint="choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def refuse_others(path: Path) -> None:
    """Refuse a path whose place no file can take: a folder, a device, a name that is too long.

    Raises:
        OSError: it is one.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")
