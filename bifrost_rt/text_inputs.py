"""What the MLLM's text engine is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import dims
from bifrost_rt.backends.base import Buffer
from bifrost_rt.manifest import EngineSpec, TensorSpec

NAME = "mllm_text"
Arrays = dict[str, NDArray[Any]]


def prompts(spec: EngineSpec, ids: Sequence[Sequence[int]], width: int) -> Arrays:
    """Its inputs for whole texts, of which nothing is in a cache yet; the token that it chooses
    is not used.

    Args:
        ids: per text, of any lengths.
        width: rows of each text, at least as many as the longest has. Padding stands behind a text,
            where its rows do not see it; its value does not matter.
    """
    texts = len(ids)
    padded = np.zeros((texts, width), np.int64)
    for row, values in zip(padded, ids, strict=True):
        row[: len(values)] = values
    sizes = {
        **{dims.TEXTS: texts, dims.NEW_TOKENS: width, dims.CACHE_TOKENS: width},
        **{dims.IMAGE_TOKENS: 1, dims.ANSWER_TOKENS: 1},
    }
    return {
        **_zeros(spec.inputs, sizes),
        "input_ids": padded,
        "row_sources": np.arange(texts * width).reshape(texts, width),
        "positions": np.tile(np.arange(width), (3, texts, 1)),
        "new_length": np.array([len(row) for row in ids], np.int64),
        "top_p": np.ones(1, np.float32),
        "repetition_penalty": np.ones(1, np.float32),
    }


def of_drawing(outputs: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """Return what drawing reads: keys and values, and the mask token."""
    wanted = ("text_keys.", "text_values.", "masked_token")
    return {name: buffer for name, buffer in outputs.items() if name.startswith(wanted)}


def rows(
    ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    image_tokens: Mapping[int, NDArray[np.float32]],
    width: int,
    hidden_size: int,
) -> Arrays:
    """Its inputs that describe the new rows of one text.

    Args:
        ids: [R]
        positions: [3, R]
        image_tokens: row -> the token [D] that stands there.
        width: at least R. Padding repeats the last row: it is seen, and counted for the repetition
            penalty, no more than that row.
    """
    count = len(ids)
    padding = ((0, 0), (0, width - count))
    sources = np.arange(width)
    for i, row in enumerate(image_tokens):
        sources[row] = width + i
    given = list(image_tokens.values()) or [np.zeros(hidden_size, np.float32)]
    return {
        "input_ids": np.pad(ids[None], padding, mode="edge"),
        "positions": np.pad(positions, padding, mode="edge")[:, None],
        "row_sources": sources[None],
        "image_tokens": np.stack(given).astype(np.float32),
        "new_length": np.array([count], np.int64),
    }


def state(spec: EngineSpec, ids: NDArray[np.int64], past: int, answer_tokens: int) -> Arrays:
    """Its inputs that a step hands to the next, of one text, before its first token: apart from the
    rows and the cache.

    Args:
        ids: [S], of the whole prompt.
        past: how many of its rows are in the cache.
        answer_tokens: room for the answer.
    """
    vocabulary = spec.output("logits").shape[1]
    assert isinstance(vocabulary, int)
    seen = np.zeros((1, vocabulary), np.float32)
    seen[0, ids] = 1
    return {
        "past_length": np.array([past], np.int64),
        "seen": seen,
        "answer": np.zeros((1, answer_tokens), np.int64),
        "answer_step": np.zeros(1, np.int64),
    }


def empty_cache(spec: EngineSpec, capacity: int) -> Arrays:
    """Keys and values of one text without rows. All zeros: rows that nobody sees must be finite."""
    sizes = {dims.TEXTS: 1, dims.CACHE_TOKENS: capacity}
    return _zeros([t for t in spec.inputs if t.name in _caches(spec).values()], sizes)


def written(spec: EngineSpec, cache: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """Return the buffers of a cache that the engine is given, by the outputs that it writes them
    as."""
    return {output: cache[name] for output, name in _caches(spec).items()}


def _caches(spec: EngineSpec) -> dict[str, str]:
    """Output -> input of keys and values."""
    return {state.output: state.input for state in spec.state if state.kind == "append"}


def _zeros(tensors: Iterable[TensorSpec], sizes: Mapping[str, int]) -> Arrays:
    return {t.name: np.zeros(dims.shape_at(t.shape, sizes), t.dtype) for t in tensors}
