"""nvfp4: E2M1 in blocks of 16, on Blackwell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bifrost_rt.formats import nvfp4
from export.formats.quantized import QuantizedFormat

if TYPE_CHECKING:
    from torch import Tensor

    from export.quantize.rounding import Quantized

BLOCK = 16
UNIT = 6.0 * 448.0  # the largest E2M1 value under the largest E4M3 scale


@dataclass(frozen=True, kw_only=True)
class NvFp4(QuantizedFormat):
    """The arithmetic."""

    def quantize(self, weight: Tensor) -> Quantized:
        """Round a float32 weight [K, N]."""
        from export.quantize.rounding import SMALLEST, Quantized, e2m1_codes, to_e4m3

        blocks = weight.unflatten(0, (-1, BLOCK))
        largest = blocks.abs().amax(1)
        tensor_scale = (largest.max() / UNIT).clamp(min=SMALLEST)
        scale = to_e4m3(largest / self.largest / tensor_scale)
        wide = scale.float() * tensor_scale
        codes = e2m1_codes(blocks / wide.clamp(min=SMALLEST)[:, None])
        return Quantized(codes.flatten(0, 1), scale, tensor_scale)

    def dequantize(self, codes: Tensor, scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Return what a stored weight stands for: float32 [K, N]."""
        from export.quantize.rounding import e2m1_values

        assert tensor_scale is not None
        wide = scale.float() * tensor_scale
        return e2m1_values(codes).unflatten(0, (-1, BLOCK)).mul_(wide[:, None]).flatten(0, 1)

    def round_activations(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return what is left of an activation [..., K]; `scale` is that of the blocks' scales."""
        from export.quantize.rounding import SMALLEST, to_e2m1, to_e4m3

        blocks = x.unflatten(-1, (-1, BLOCK))
        largest = blocks.abs().amax(-1, keepdim=True)
        wide = to_e4m3(largest / self.largest / scale).float() * scale
        return (to_e2m1(blocks / wide.clamp(min=SMALLEST)) * wide).flatten(-2)


FORMAT = NvFp4(
    runtime=nvfp4.FORMAT,
    other_bytes=2,
    rate="fp4",
    since=100,
    stored="uint4",
    inputs=("NVFP4QuantizeDequantize",),
    weight_function="NVFP4Dequantize",
    tensorrt="FP4",
    plan=("fp4_e2m1", "fp4"),
    rounding=0.04,  # on the default model 1.2e-2 in whole
    block=BLOCK,
    largest=6.0,
    unit=UNIT,
    packed=True,
    scaled_whole=True,
)
