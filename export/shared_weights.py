"""Weights that several engines of a build read: stored once, with the first of them.

Two engines share what is one tensor of the checkpoint, rounded or quantized alike. The later graph
names the place in the earlier one's file.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from export import lazy_tensors
from export.initializers import TRANSPOSED, Place, Weight
from export.stages import Stage

LEAST = 4096  # bytes; not worth a second file


class SharedWeights:
    """What the engines of a build share, filled as they are written, in their order."""

    def __init__(self, stages: Iterable[Stage]) -> None:
        counts = Counter(identity for stage in stages for identity in _identities(stage))
        self._several = {identity for identity, number in counts.items() if number > 1}
        self._makers: dict[str, str] = {}
        self._places: dict[str, Place] = {}

    def before(self, stage: Stage) -> dict[str, str]:
        """Give the tensors that an earlier engine has too, by identity, with that engine's key: it
        decides where they are."""
        makers = self._makers
        return {identity: makers[identity] for identity in _identities(stage) & makers.keys()}

    def names(self, stage: Stage, model: ir.Model) -> dict[str, str]:
        """Name what a graph has in common with other engines: initializer -> a name in the set."""
        found = {name: source.identity for name, source in lazy_tensors.named(stage.module).items()}
        return {
            name: _name(value.const_value)
            for name, value in model.graph.initializers.items()
            if isinstance(value.const_value, Weight)
            and value.const_value.nbytes >= LEAST
            and found.get(name.removesuffix(TRANSPOSED)) in self._several
        }

    def place(self, name: str) -> Place | None:
        """Say where an earlier engine has stored a tensor, by its name in the set."""
        return self._places.get(name)

    def add(self, stage: Stage, key: str, stored: Mapping[str, Sequence[Any]]) -> None:
        """Note an engine that is written, now or by an earlier build.

        Args:
            key: of what it was made from.
            stored: name in the set -> file, offset and length of what it holds itself.
        """
        for identity in _identities(stage) & self._several:
            self._makers.setdefault(identity, key)
        self._places |= {name: Place(*place) for name, place in stored.items()}


def _identities(stage: Stage) -> set[str]:
    return {source.identity for source in lazy_tensors.named(stage.module).values()}


def _name(weight: Weight) -> str:
    return hashlib.sha256(f"{weight.source.identity} {weight.dtype.name}".encode()).hexdigest()[:32]
