"""The one logger of a process.

TensorRT keeps the first logger that it is given for everything that follows, so builder, parser and
runtime share this one. It says nothing; it collects what went wrong, for whoever raises the error,
and what was warned of: a graph that cannot be recorded is no error to the library.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections import deque
from typing import Any

_MEMORY = re.compile(r"Total (Activation|Weights) Memory: (\d+)")
WARNINGS = 100  # that are kept: nobody may ask for them


@functools.cache
def logger(module: str) -> Any:
    """Return the logger for `tensorrt` or `tensorrt_rtx`: an ILogger with `take()`,
    `take_warnings()` and `take_memory()`."""
    library: Any = importlib.import_module(module)
    grave = (library.ILogger.INTERNAL_ERROR, library.ILogger.ERROR)

    class Logger(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._errors: list[str] = []
            self._memory: dict[str, int] = {}
            self._warnings: deque[str] = deque(maxlen=WARNINGS)

        def log(self, severity: Any, message: str) -> None:
            if severity in grave:
                self._errors.append(message)
            elif severity == library.ILogger.WARNING:
                self._warnings.append(message)
            elif severity == library.ILogger.INFO and (said := _MEMORY.search(message)):
                kind, size = said[1], int(said[2])
                self._memory[kind] = max(size, self._memory.get(kind, 0))

        def take(self) -> list[str]:
            """Return the errors since the last call."""
            errors, self._errors = self._errors, []
            return errors

        def take_memory(self) -> tuple[int, int]:
            """Return the bytes of activations and of weights that a builder has stated since the
            last call, the most of several targets; 0 where it stated none."""
            memory, self._memory = self._memory, {}
            return memory.get("Activation", 0), memory.get("Weights", 0)

        def take_warnings(self) -> list[str]:
            """Return the warnings since the last call, at most the last `WARNINGS`."""
            warnings = list(self._warnings)
            self._warnings.clear()
            return warnings

    return Logger()
