"""int4: weights alone, in blocks of 32; products are 16 bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bifrost_rt.formats import int4
from export.formats.quantized import QuantizedFormat

if TYPE_CHECKING:
    from torch import Tensor

    from export.quantize.rounding import Quantized


@dataclass(frozen=True, kw_only=True)
class Int4(QuantizedFormat):
    """The arithmetic."""

    def quantize(self, weight: Tensor) -> Quantized:
        """Round a float32 weight [K, N]."""
        from export.quantize.rounding import Quantized

        blocks = weight.unflatten(0, (-1, self.block or 1))
        scale = self._best_scale(blocks, blocks.abs().amax(1))
        codes = self._codes(blocks, scale.float()[:, None])
        return Quantized(codes.flatten(0, 1).char(), scale)

    def dequantize(self, codes: Tensor, scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Return what a stored weight stands for: float32 [K, N]."""
        values, wide = codes.float(), scale.float()
        return values.unflatten(0, (-1, self.block or 1)).mul_(wide[:, None]).flatten(0, 1)

    def round_activations(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return an activation as it is."""
        return x

    def _codes(self, blocks: Tensor, wide: Tensor) -> Tensor:
        return (blocks / wide).round().clamp(-self.largest - 1, self.largest)

    def _best_scale(self, blocks: Tensor, largest: Tensor) -> Tensor:
        """Per block, of a few clipped ranges the one with the smallest squared error: with fifteen
        levels, losing the largest weight's tip often pays for a finer step."""
        import torch

        best, error = _half(largest), torch.full_like(largest, torch.inf)
        for share in (1.0, 0.95, 0.9, 0.85, 0.8):
            scale = _half(largest * share / self.largest)
            wide = scale.float()[:, None]
            found = (self._codes(blocks, wide) * wide - blocks).square().sum(1)
            best = torch.where(found < error, scale, best)
            error = torch.minimum(found, error)
        return best


def _half(scale: Tensor) -> Tensor:
    """Scales in 16 bit: they are a ninth of what is stored."""
    return scale.clamp(min=2.0**-14).half()


FORMAT = Int4(
    runtime=int4.FORMAT,
    other_bytes=2,
    rate="fp16",
    since=80,
    stored="int4",
    tensorrt="INT4",
    plan=("int4",),
    block=32,
    largest=7.0,
    calibrated=False,
    packed=True,
)
