"""Commands of this package say in one line which extra brings what is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from export.errors import MissingPackageError

OURS = ("bifrost_rt", "export")


@contextlib.contextmanager
def needed(extra: str) -> Iterator[None]:
    """Run a command whose imports an extra brings.

    Args:
        extra: as in `pip install 'bifrost-rt[extra]'`.

    Raises:
        MissingPackageError: in place of Python's own error for a package that is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package in OURS:
            raise  # a fault of this package, not of what is installed
        raise MissingPackageError(
            f"the Python package `{package}` is not installed",
            hint=f"pip install 'bifrost-rt[{extra}]'",
        ) from error
