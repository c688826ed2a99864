"""What the MLLM's text engine is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt import dims
from bifrost_rt.manifest import EngineSpec

NAME = "mllm_text"


def prompts(spec: EngineSpec, ids: Sequence[Sequence[int]], width: int) -> dict[str, NDArray[Any]]:
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
        **{t.name: np.zeros(dims.shape_at(t.shape, sizes), t.dtype) for t in spec.inputs},
        "input_ids": padded,
        "row_sources": np.arange(texts * width).reshape(texts, width),
        "positions": np.tile(np.arange(width), (3, texts, 1)),
        "new_length": np.array([len(row) for row in ids], np.int64),
        "top_p": np.ones(1, np.float32),
        "repetition_penalty": np.ones(1, np.float32),
    }
