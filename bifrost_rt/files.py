"""Files appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from bifrost_rt.errors import RequestError


@contextlib.contextmanager
def written_aside(target: Path, keep: bool = True) -> Iterator[Path]:
    """A file to write that takes the place of `target` when it is complete.

    Args:
        keep: False only tries that the folder takes a file, before work is spent on its content.

    Raises:
        RequestError: the file cannot be written.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        if keep:
            aside.replace(target)
    except OSError as error:
        raise RequestError(
            f"{target}: cannot be written: {error.strerror or error}", hint="choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
