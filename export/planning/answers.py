"""What answers in words ask of a device: a token reads every weight of the text engine once, its
embedding's apart, of which it reads a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bifrost_rt import dims
from bifrost_rt.dims import CACHE_TOKENS
from bifrost_rt.manifest import EngineSpec
from export.formats import FULL
from export.planning.storage import Elements, Storage


@dataclass(frozen=True)
class Answers:
    """Of the engine that gives them.

    Attributes:
        table: numbers in the embedding.
        table_bytes: of it in a built set; None before there is one.
        cache: bytes of the keys and values of the longest conversation.
    """

    table: int
    table_bytes: int | None
    cache: int

    def read(self, stored: int, storage: Storage | None, elements: Elements | None) -> int:
        """Return bytes that a token reads.

        Args:
            stored: of all weights.
            storage: their precision; None for that of a built set.
            elements: what was counted of them before there is a set.
        """
        table = self.table_bytes
        if table is None:
            assert elements is not None
            table = self.table * elements.rest(storage or Storage(FULL)).other_bytes
        return stored - table


def of(
    spec: EngineSpec, sizes: Mapping[str, int], table_bytes: int | None = None
) -> Answers | None:
    """None of an engine that gives no answers.

    Args:
        sizes: a number for every symbol of its inputs and outputs.
    """
    if not dims.reads_pieces(spec):
        return None
    logits, image = spec.output("logits"), spec.input("image_tokens")
    assert image is not None
    table = dims.shape_at((logits.shape[1], image.shape[1]), sizes)
    longest = {**sizes, CACHE_TOKENS: dims.CONTEXT}
    cache = [t for t in spec.outputs if CACHE_TOKENS in t.shape]
    numbers = sum(math.prod(dims.shape_at(t.shape, longest)) for t in cache)
    return Answers(math.prod(table), table_bytes, 4 * numbers)
