"""Strict loading: what does not fit is named, with the nearest known name."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from bifrost_rt import serialization


@dataclass(frozen=True)
class Inner:
    size: int


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    many: tuple[Inner, ...] = ()
    by_name: dict[str, float] | None = None


def test_plain_data_becomes_dataclasses() -> None:
    data = {"name": "a", "inner": {"size": 1}, "many": [{"size": 2}], "by_name": {"x": 3}}
    assert serialization.load(Outer, data) == Outer("a", Inner(1), (Inner(2),), {"x": 3.0})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"name": "a", "iner": {}}, r"unknown key 'iner' \(did you mean 'inner'\?\)"),
        ({"name": "a"}, "missing key 'inner'"),
        ({"name": 3, "inner": {"size": 1}}, "name: expected str, found int 3"),
        ({"name": "a", "inner": {"size": "1"}}, "inner.size: expected int, found str '1'"),
        ({"name": "a", "inner": {"size": True}}, "inner.size: expected int, found bool"),
        ({"name": "a", "inner": {"size": 1}, "many": [{}]}, r"many\[0\]: missing key 'size'"),
        ({"name": "a", "inner": {"size": 1}, "many": 3}, "many: expected"),
        ([], "expected a table, found list"),
    ],
)
def test_what_does_not_fit_is_named(data: object, message: str) -> None:
    with pytest.raises(serialization.SerializationError, match=message):
        serialization.load(Outer, data)
