"""The one logger of a process.

TensorRT keeps the first logger that it is given for everything that follows, so builder, parser and
runtime share this one. It says nothing; it collects what went wrong, for whoever raises the error.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def logger(module: str) -> Any:
    """The logger for `tensorrt` or `tensorrt_rtx`: an ILogger with `take()`."""
    library: Any = importlib.import_module(module)
    grave = (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR)

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in grave:
                self._errors.append(message)

        def take(self) -> list[str]:
            """The errors since the last call."""
            errors, self._errors = self._errors, []
            return errors

    return Logger()
