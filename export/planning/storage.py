"""How many bytes a weight takes, precision by precision."""

from __future__ import annotations

from dataclasses import dataclass

from export.formats import FULL
from export.formats.base import Format


@dataclass(frozen=True)
class Elements:
    """The numbers that an engine stores.

    Attributes:
        linear: weights of linear layers.
        excepted: of further ones, which stay in 16 bit where others are quantized.
        channels: output channels of `linear`.
        other: weights of embeddings and convolutions.
        kept: bytes of what stays in float32 at every precision: norms, biases, tables, and whatever
            is too small to be worth a conversion.
    """

    linear: int
    excepted: int
    channels: int
    other: int
    kept: int

    def bytes_at(self, storage: Format | None) -> int:
        """Return bytes of all of them; None is float32."""
        s = storage or FULL
        scales = self.channels * s.channel_bytes
        return (
            round(self.linear * s.linear_bits / 8)
            + round(self.excepted * s.kept_bits / 8)
            + self.other * s.other_bytes
            + scales
            + self.kept
        )
