"""Every error a user can meet, drawn as one tree.

    BifrostError
    ├── EngineSetError          a set on disk: missing, foreign, newer, damaged
    │   └── IntegrityError      a file whose bytes are not those that were built
    ├── BackendError            a backend that is unavailable or failed; says why
    ├── BudgetError             a memory budget that one engine exceeds by itself
    ├── EngineInputError        an input or output of an engine: name, dtype or shape
    ├── NumericsError           values that are not finite; names the tensor and the engine
    ├── GeneratorStateError     a call that a generator cannot take now (also a RuntimeError)
    ├── TextFileError           a text file that is not UTF-8 (also a ValueError)
    └── RequestError            arguments of a request (also a ValueError)
        └── RequestTypeError    … of the wrong type (also a TypeError)

Messages name the engine or file, what was expected and what was found; `hint` says what to do.
"""

from __future__ import annotations


class BifrostError(Exception):
    """Base of all errors raised on purpose by this package.

    Args:
        message: what is wrong, in one sentence.
        hint: what the user can do about it, a command where there is one.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class EngineSetError(BifrostError):
    """An engine set cannot be used: no manifest, a foreign or newer format, a missing file."""


class IntegrityError(EngineSetError):
    """A file of an engine set differs from what was built (size or sha256)."""


class BackendError(BifrostError):
    """A backend is not available here, or its library refused an engine."""


class BudgetError(BifrostError):
    """A memory budget that one engine exceeds even when nothing else is in memory."""


class EngineInputError(BifrostError):
    """A tensor handed to an engine has a wrong name, dtype or shape."""


class NumericsError(BifrostError):
    """A tensor between two engines holds NaN or infinity, so that no image can come of it."""


class GeneratorStateError(BifrostError, RuntimeError):
    """A call to a generator that is closed, or that is drawing in the very thread that calls."""


class TextFileError(BifrostError, ValueError):
    """A text file whose bytes are not UTF-8."""


class RequestError(BifrostError, ValueError):
    """A generation request that cannot be served as asked."""


class RequestTypeError(RequestError, TypeError):
    """A generation request with an argument of the wrong type."""
