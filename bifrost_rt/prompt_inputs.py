"""What a request's prompts are to the engines that read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bifrost_rt.manifest import SetSpec
from bifrost_rt.request import Request
from bifrost_rt.tokenizers import Tokenizers

SHORTEST = 32  # tokens that a text is padded to for compiled engines


@dataclass(frozen=True)
class MllmTexts:
    """What the MLLM reads. U different texts, G branches of guidance, B images.

    Attributes:
        ids: of each text.
        width: how many tokens they are padded to.
        index: which text each image has, int64 [G, B].
    """

    ids: list[list[int]]
    width: int
    index: NDArray[np.int64]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text, [U]."""
        return np.array([len(row) for row in self.ids], np.int64)

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that the keys and values follow from."""
        return {
            "ids": np.array([token for row in self.ids for token in row], np.int64),
            "lengths": self.lengths,
            "width": np.array([self.width]),
        }


def mllm_texts(tokenizers: Tokenizers, manifest: SetSpec, request: Request) -> MllmTexts:
    """Prompts -> ids. At cfg 1 the unconditional half cancels and is not computed."""
    guided = request.parameters.cfg_weight != 1.0
    texts = list(dict.fromkeys(["", *request.prompts] if guided else request.prompts))
    ids = [tokenizers.mllm_prompt(text) for text in texts]
    rows = np.array([texts.index(request.prompts[i]) for i in request.prompt_index], np.int64)
    index = np.stack([np.full_like(rows, texts.index("")), rows] if guided else [rows])
    return MllmTexts(ids, text_width(manifest, max(map(len, ids))), index)


def text_width(manifest: SetSpec, longest: int) -> int:
    """Say how many tokens the texts of a run are padded to, of which the longest has `longest`.

    Graphs take any length. A compiled engine compiles kernels for every new one, so there it is one
    of a few: powers of two from `SHORTEST`, up to what the set takes.
    """
    compiled = any(spec.compiled is not None for spec in manifest.engines)
    if not compiled:
        return longest
    bucket = max(SHORTEST, 1 << (longest - 1).bit_length())
    most = manifest.dimensions["text_tokens"].max
    return bucket if most is None else max(longest, min(bucket, most))
