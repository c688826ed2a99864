"""The JSON files of a checkpoint, read strictly: a value of a wrong type or out of bounds is an
error that names file, key, value and what was expected, before any library sees it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bifrost_rt import files
from bifrost_rt.errors import TextFileError
from export import foreign
from export.errors import CheckpointError

T = TypeVar("T")
WIDEST = 1 << 24  # of anything that shapes a tensor
MOST_LAYERS = 1024


class Kind(Protocol):
    """What a key's value must be."""

    def convert(self, value: Any) -> Any:
        """Return the value as networks take it.

        Raises:
            ValueError: it is of another type, or out of bounds.
        """

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class Whole:
    """A whole number; 2.0 is one, true is none."""

    least: int = 1
    most: int = WIDEST

    def convert(self, value: Any) -> int:
        """See `Kind`."""
        whole = not isinstance(value, bool) and isinstance(value, (int, float))
        # a comparison, not int(): NaN and infinity have none
        if not whole or not self.least <= value <= self.most or value != int(value):
            raise ValueError
        return int(value)

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}"


@dataclass(frozen=True)
class Real:
    """A finite number between bounds."""

    least: float
    most: float

    def convert(self, value: Any) -> float:
        """See `Kind`."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        if not self.least <= value <= self.most:
            raise ValueError
        return float(value)

    def __str__(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Flag:
    """true or false."""

    def convert(self, value: Any) -> bool:
        """See `Kind`."""
        if not isinstance(value, bool):
            raise ValueError
        return value

    def __str__(self) -> str:
        return "true or false"


@dataclass(frozen=True)
class Text:
    """A string."""

    def convert(self, value: Any) -> str:
        """See `Kind`."""
        if not isinstance(value, str):
            raise ValueError
        return value

    def __str__(self) -> str:
        return "a string"


@dataclass(frozen=True)
class Many:
    """A list of one kind."""

    of: Kind
    least: int = 1
    most: int = MOST_LAYERS

    def convert(self, value: Any) -> tuple[Any, ...]:
        """See `Kind`."""
        if not isinstance(value, (list, tuple)) or not self.least <= len(value) <= self.most:
            raise ValueError
        return tuple(self.of.convert(item) for item in value)

    def __str__(self) -> str:
        number = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"a list of {number}, each {self.of}"


@dataclass(frozen=True)
class Optional:
    """Another kind, or null."""

    of: Kind

    def convert(self, value: Any) -> Any:
        """See `Kind`."""
        return None if value is None else self.of.convert(value)

    def __str__(self) -> str:
        return f"{self.of}, or null"


WIDTH, LAYERS, EPSILON = Whole(), Whole(0, MOST_LAYERS), Real(0, 1)


@dataclass(frozen=True)
class Config:
    """One JSON object, and the file that it stands in.

    Attributes:
        names: how errors call a key that stands in a table of the file, such as
            `text_config.hidden_size`.
    """

    path: Path
    values: Mapping[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Config:
        """Read a config file.

        Raises:
            CheckpointError: missing, or not a JSON object.
        """
        return cls(path, read_json(path))

    def name(self, key: str) -> str:
        """Return a key's full name in the file."""
        return self.names.get(key, key)

    def get(self, key: str, kind: Kind, default: Any = ...) -> Any:
        """Return a key's value; `default` where the key is absent.

        Raises:
            CheckpointError: absent without a default, of another kind, or out of bounds.
        """
        if key not in self.values:
            if default is ...:
                raise CheckpointError(
                    f"{self.path}: missing key {self.name(key)}, expected {kind}",
                    hint="the file is incomplete, or belongs to another model",
                )
            return default
        value = self.values[key]
        try:
            return kind.convert(value)
        except (ValueError, OverflowError):
            raise self.error(key, f"expected {kind}") from None

    def only(self, key: str, *supported: Any) -> None:
        """Refuse every value but those that the engines compute; absent is the first of them.

        Raises:
            CheckpointError: another value.
        """
        value = self.values.get(key, supported[0])
        if not any(value == one for one in supported):
            known = [one for one in supported if one is not None] or [None]
            raise CheckpointError(
                f"{self.path}: {self.name(key)} = {show(value)} is not supported, only "
                + " and ".join(show(one) for one in known)
            )

    def table(self, key: str) -> Config | None:
        """Return a table inside this one; None where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, "expected an object")
        return Config(self.path, value, {name: f"{self.name(key)}.{name}" for name in value})

    def over(self, key: str) -> Config:
        """Return this table with the entries of its table `key` in front of its own."""
        inner = self.table(key)
        if inner is None:
            return self
        return Config(self.path, {**self.values, **inner.values}, {**self.names, **inner.names})

    def among(self, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """Return the keys of `kinds` that are there, with their values.

        Raises:
            CheckpointError: of another kind, or out of bounds.
        """
        return {key: self.get(key, kind) for key, kind in kinds.items() if key in self.values}

    def error(self, key: str, expected: str, hint: str | None = None) -> CheckpointError:
        """Say what is wrong with a key's value."""
        return CheckpointError(
            f"{self.path}: {self.name(key)} is {show(self.values.get(key))}, {expected}", hint=hint
        )

    def make(self, what: str, build: Callable[..., T], arguments: Mapping[str, Any]) -> T:
        """Call a library's constructor with values of this file.

        Raises:
            CheckpointError: the library refused them. It names the keys without which it would not
                have, if there are such.
        """
        try:
            return build(**arguments)
        except Exception as error:  # libraries raise whatever a value runs into
            reason = str(error).strip().splitlines()
            keys = [key for key in arguments if _builds(build, arguments, key)]
            at = ", ".join(f"{self.name(key)} = {show(arguments[key])}" for key in keys)
            raise CheckpointError(
                f"{self.path}: no {what} can be made of {at or 'these values'}: "
                f"{type(error).__name__}: {reason[0] if reason else 'no reason given'}",
                hint="compare the file with the one that the model was published with",
            ) from error


def _builds(build: Callable[..., Any], arguments: Mapping[str, Any], without: str) -> bool:
    try:
        build(**{key: value for key, value in arguments.items() if key != without})
    except Exception:  # whatever it is, `without` alone is not to blame
        return False
    return True


def read_text(path: Path) -> str:
    """Return a text file of a checkpoint: UTF-8, with or without a byte order mark.

    Raises:
        CheckpointError: it cannot be read, or is something else.
    """
    try:
        text = files.read_text(path)
    except OSError as error:
        if found := foreign.file(path):
            raise CheckpointError(
                f"{path}: cannot be read: it is {found.what}", hint=found.hint
            ) from None
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", hint=foreign.INCOMPLETE
        ) from None
    except TextFileError as error:
        if found := foreign.file(path):
            raise CheckpointError(f"{path}: it is {found.what}", hint=found.hint) from None
        raise CheckpointError(error.message, hint=error.hint) from None
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file of a checkpoint.

    Raises:
        CheckpointError: missing, or not a JSON object.
    """
    text = read_text(path)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if found := foreign.file(path):
            raise CheckpointError(f"{path}: not JSON, but {found.what}", hint=found.hint) from None
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {show(data)}")
    return data


def show(value: Any, most: int = 80) -> str:
    """Return a JSON value in an error: strings in quotes, as short as need be."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, float) and not math.isfinite(value):
        text = str(value)
    else:
        text = json.dumps(value, default=repr)
    return text if len(text) <= most else text[:most] + "…"
