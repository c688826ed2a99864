"""What a request's prompts are to the engines that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt.manifest import SetSpec
from bifrost_rt.request import Request
from bifrost_rt.text import Tokenizers

SHORTEST = 32  # tokens that a text is padded to for compiled engines


@dataclass(frozen=True)
class MllmTexts:
    """What the MLLM reads. U different texts of at most S tokens, G branches of guidance, B images.

    Attributes:
        inputs: `input_ids` [U, S] and `text_index` [G, B], which text each image has.
        lengths: tokens of each image's texts, [G, B].
    """

    inputs: dict[str, NDArray[Any]]
    lengths: NDArray[np.int64]


def mllm_texts(tokenizers: Tokenizers, manifest: SetSpec, request: Request) -> MllmTexts:
    """Prompts -> ids. At cfg 1 the unconditional half cancels and is not computed."""
    guided = request.parameters.cfg_weight != 1.0
    texts = list(dict.fromkeys(["", *request.prompts] if guided else request.prompts))
    ids = [tokenizers.mllm_prompt(text) for text in texts]
    lengths = np.array([len(row) for row in ids], np.int64)
    rows = np.array([texts.index(request.prompts[i]) for i in request.prompt_index], np.int64)
    text_index = np.stack([np.full_like(rows, texts.index("")), rows] if guided else [rows])
    padded = _right_padded(ids, text_width(manifest, int(lengths.max())))
    return MllmTexts({"input_ids": padded, "text_index": text_index}, lengths[text_index])


def text_width(manifest: SetSpec, longest: int) -> int:
    """How many tokens the texts of a run are padded to, of which the longest has `longest`.

    Graphs take any length. A compiled engine compiles kernels for every new one, so there it is one
    of a few: powers of two from `SHORTEST`, up to what the set takes.
    """
    compiled = any(spec.compiled is not None for spec in manifest.engines)
    if not compiled:
        return longest
    bucket = max(SHORTEST, 1 << (longest - 1).bit_length())
    most = manifest.dimensions["text_tokens"].max
    return bucket if most is None else max(longest, min(bucket, most))


def _right_padded(ids: list[list[int]], width: int) -> NDArray[np.int64]:
    """[U, S]. Padding stands behind the text, where causal attention never sees it, and the visual
    tokens see `text_length` of it; its value does not matter."""
    padded = np.zeros((len(ids), width), np.int64)
    for row, values in zip(padded, ids, strict=True):
        row[: len(values)] = values
    return padded
