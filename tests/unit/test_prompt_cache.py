"""Outputs of text engines are found by what they follow from, and leave when there is no room."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bifrost_rt import RequestError, RequestTypeError, memory_plan, prompt_cache
from bifrost_rt.prompt_cache import PromptCache, key


def outputs(value: float, values: int = 4) -> dict[str, NDArray[np.float32]]:
    return {"x": np.full(values, value, np.float32)}


def test_a_key_tells_engine_name_type_shape_and_values() -> None:
    ids = np.arange(6, dtype=np.int64)
    base = key("a", {"ids": ids})
    assert base == key("a", {"ids": ids.copy()})
    others = [
        key("b", {"ids": ids}),
        key("a", {"other": ids}),
        key("a", {"ids": ids.astype(np.int32)}),
        key("a", {"ids": ids.reshape(2, 3)}),
        key("a", {"ids": ids[::-1]}),
        key("a", {"ids": ids, "more": ids}),
    ]
    assert len({base, *others}) == 7
    assert key("a", {"x": ids, "y": ids[:1]}) == key("a", {"y": ids[:1], "x": ids})


def test_what_was_not_asked_for_longest_goes_first() -> None:
    cache = PromptCache(48)
    for name in "abc":
        cache.keep(name.encode(), outputs(ord(name)))
    assert cache.get(b"a") is not None
    cache.keep(b"d", outputs(0))
    assert cache.get(b"b") is None
    assert {name for name in "acd" if cache.get(name.encode()) is not None} == {*"acd"}
    assert cache.size == 48


def test_a_copy_is_kept() -> None:
    cache, given = PromptCache(48), outputs(1)
    cache.keep(b"a", given)
    given["x"][:] = 2
    found = cache.get(b"a")
    assert found is not None
    assert np.array_equal(found["x"], outputs(1)["x"])


def test_what_is_too_large_or_not_finite_is_not_kept() -> None:
    cache = PromptCache(48)
    cache.keep(b"a", outputs(1))
    cache.keep(b"large", outputs(1, 13))
    cache.keep(b"nan", outputs(np.nan))
    assert cache.get(b"large") is None
    assert cache.get(b"nan") is None
    assert cache.get(b"a") is not None
    PromptCache(0).keep(b"a", outputs(1))


def test_a_limit_holds_until_the_next() -> None:
    cache = PromptCache(48)
    for name in "abc":
        cache.keep(name.encode(), outputs(1))
    cache.limit(20)
    assert cache.size == 16
    assert cache.get(b"c") is not None
    cache.limit(0)
    cache.keep(b"d", outputs(1))
    assert cache.size == 0
    cache.limit(48)
    cache.keep(b"d", outputs(1))
    assert cache.size == 16


def test_the_default_is_a_sixteenth_of_the_budget_at_most() -> None:
    assert prompt_cache.default_bytes(None) == 256 << 20
    assert prompt_cache.default_bytes(64 << 30) == 256 << 20
    assert prompt_cache.default_bytes(160) == 10


def test_its_size_may_be_zero_and_must_be_a_size() -> None:
    assert memory_plan.parse("0", "prompt_cache", 0) == memory_plan.parse(0, "prompt_cache", 0) == 0
    assert memory_plan.parse("1KiB", "prompt_cache", 0) == 1024
    with pytest.raises(RequestError, match="^prompt_cache 'much' is not a size"):
        memory_plan.parse("much", "prompt_cache", 0)
    with pytest.raises(RequestError, match="^prompt_cache must be at least 0 bytes, got -1"):
        memory_plan.parse(-1, "prompt_cache", 0)
    with pytest.raises(RequestTypeError, match="^prompt_cache must be bytes or a text"):
        memory_plan.parse(True, "prompt_cache", 0)
