"""JSON and TOML into frozen dataclasses, strictly: an unknown key, a missing key or a wrong type
is an error that names the place, and the nearest known name."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class SerializationError(Exception):
    """`where` is the path inside the document, such as `engines[2].inputs[0].dtype`."""

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where}: {problem}" if where else problem)
        self.where = where
        self.problem = problem


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is close."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""


def load(cls: type[T], data: Any, where: str = "") -> T:
    """Build dataclass `cls` from plain data.

    Raises:
        SerializationError: for the first thing that does not fit.
    """
    if not isinstance(data, Mapping):
        raise SerializationError(where, f"expected a table, found {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise SerializationError(where, f"unknown key {key!r}{nearest(str(key), fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        at = f"{where}.{name}" if where else name
        if name in data:
            values[name] = _value(hints[name], data[name], at)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SerializationError(where, f"missing key {name!r}")
    return cls(**values)


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        errors = []
        for option in args:
            try:
                return _value(option, data, where)
            except SerializationError as error:
                errors.append(error)
        raise errors[0]
    if hint is type(None):
        if data is None:
            return None
    elif origin is tuple:
        if isinstance(data, (list, tuple)):
            return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    elif origin in (dict, Mapping) or hint is dict:
        if isinstance(data, Mapping):
            return {key: _value(args[1], item, f"{where}.{key}") for key, item in data.items()}
    elif origin is typing.Literal:
        if data in args:
            return data
        raise SerializationError(
            where, f"expected one of {', '.join(map(repr, args))}, found {data!r}"
        )
    elif dataclasses.is_dataclass(hint):
        return load(typing.cast(type, hint), data, where)
    elif hint is float:
        if isinstance(data, (int, float)) and not isinstance(data, bool):
            return float(data)
    elif isinstance(hint, type) and type(data) is hint:
        return data
    expected = getattr(hint, "__name__", str(hint))
    raise SerializationError(where, f"expected {expected}, found {type(data).__name__} {data!r}")
