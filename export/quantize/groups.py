"""Layers that are given one precision together: the blocks of one kind of an engine, and of what
stays in 16 bit otherwise the layers that may give up bits where memory is short.

A group is called by the pattern that a recipe names it with: `stage:list.of.blocks.*`.
"""

from __future__ import annotations

import re

from export.quantize.policy import Layer

_BLOCK = re.compile(r"(.*?\.)\d+\.")


def of(stage: str, layer: Layer) -> str | None:
    """Return the group of a layer; None where it stays in 16 bit whatever the memory."""
    if layer.exception:
        return f"{stage}:{layer.when_short}" if layer.when_short else None
    found = _BLOCK.match(layer.path)
    return f"{stage}:{found[1]}*" if found else f"{stage}:{layer.path}"
