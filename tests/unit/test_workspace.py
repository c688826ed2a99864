"""Buffers and calls that stay: what is used again, and what is let go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from bifrost_rt import backends
from bifrost_rt.backends.base import Buffer
from bifrost_rt.buffer_pool import BufferPool


class Counting:
    """An engine that counts how often it is bound."""

    spec: Any = None

    def __init__(self) -> None:
        self.bound = 0

    def bind(
        self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]
    ) -> Callable[[], None]:
        self.bound += 1
        return lambda: None

    def close(self) -> None:
        pass


@pytest.fixture
def buffer_pool() -> BufferPool:
    return BufferPool(backends.load("onnxruntime"))


def test_the_same_size_is_the_same_buffer(buffer_pool: BufferPool) -> None:
    first = buffer_pool.put("a.x", np.ones((2, 3), np.float32))
    again = buffer_pool.put("a.x", np.zeros((2, 3), np.float32))
    assert again is first
    assert not np.asarray(first).any()
    assert buffer_pool.empty("a.x", (2, 4), np.float32) is not first
    assert buffer_pool.empty("b.x", (2, 4), np.int64).dtype == np.int64


def test_a_call_is_bound_once_for_kept_buffers(buffer_pool: BufferPool) -> None:
    engine = Counting()
    x = buffer_pool.put("a.x", np.ones(3, np.float32))
    y, z = (buffer_pool.empty(f"a.{name}", (3,), np.float32) for name in "yz")
    call = buffer_pool.bind(engine, {"x": x}, {"y": y})
    assert buffer_pool.bind(engine, {"x": x}, {"y": y}) is call
    buffer_pool.bind(engine, {"x": x}, {"y": z})
    assert engine.bound == 2
    buffer_pool.bind(engine, {"x": np.ones(3, np.float32)}, {"y": y})  # a caller's own array
    buffer_pool.bind(engine, {"x": np.ones(3, np.float32)}, {"y": y})
    assert engine.bound == 4


def test_a_buffer_that_goes_takes_its_calls_along_and_no_others(buffer_pool: BufferPool) -> None:
    engine = Counting()
    x, y, z = (buffer_pool.empty(f"a.{name}", (3,), np.float32) for name in "xyz")
    buffer_pool.bind(engine, {"x": x}, {"y": y})
    kept = buffer_pool.bind(engine, {"x": x}, {"y": z})
    new = buffer_pool.empty("a.y", (4,), np.float32)
    buffer_pool.bind(engine, {"x": x}, {"y": new})
    assert engine.bound == 3
    assert buffer_pool.bind(engine, {"x": x}, {"y": z}) is kept


def test_an_engine_that_leaves_takes_its_calls_along(buffer_pool: BufferPool) -> None:
    engine, other = Counting(), Counting()
    x, y = (buffer_pool.empty(f"a.{name}", (3,), np.float32) for name in "xy")
    for one in (engine, other, engine, other):
        buffer_pool.bind(one, {"x": x}, {"y": y})
    buffer_pool.forget(engine)
    for one in (engine, other):
        buffer_pool.bind(one, {"x": x}, {"y": y})
    assert (engine.bound, other.bound) == (2, 1)


def test_where_memory_is_short_nothing_stays(buffer_pool: BufferPool) -> None:
    buffer_pool.keep = False
    engine = Counting()
    x = buffer_pool.put("a.x", np.ones(3, np.float32))
    assert buffer_pool.put("a.x", np.ones(3, np.float32)) is not x
    y = buffer_pool.empty("a.y", (3,), np.float32)
    for _ in range(2):
        buffer_pool.bind(engine, {"x": x}, {"y": y})
    assert engine.bound == 2
