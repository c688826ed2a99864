"""Where the values of a parameter stand in a file whose tensors have other names or shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from export.lazy_tensors import LazyTensor


@dataclass(frozen=True)
class Place:
    """A tensor of a file, and what of it a parameter is.

    Attributes:
        key: the tensor's name.
        rows: the first of its rows, the first behind them, and how many the tensor has; None: all.
        swapped: the two halves of its rows stand in the other order.
        ones: dimensions of 1 that the file has at the end: a linear layer stored as a convolution.
    """

    key: str
    rows: tuple[int, int, int] | None = None
    swapped: bool = False
    ones: int = 0

    def stored_shape(self, shape: Sequence[int]) -> list[int]:
        """Return the shape that the file's tensor must have for a parameter of `shape`."""
        rows = shape[0] if self.rows is None else self.rows[2]
        return [rows, *shape[1:], *[1] * self.ones] if shape else []

    def take(self, source: LazyTensor) -> LazyTensor:
        """Return the parameter, from the rows of the file's tensor."""
        if self.ones:
            shape = source.shape[: -self.ones]
            source = source.map("flat", lambda values: values.reshape(shape), shape=shape)
        if self.swapped:
            source = source.map("halves swapped", lambda v: torch.cat(v.chunk(2)[::-1]))
        return source
