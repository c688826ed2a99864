"""fp8: E4M3, a scale per output, and one of the input from calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bifrost_rt.formats import fp8
from export.formats.quantized import PerOutput

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Fp8(PerOutput):
    """The arithmetic."""

    def codes(self, x: Tensor) -> Tensor:
        """Round units to E4M3."""
        from export.quantize.rounding import to_e4m3

        return to_e4m3(x)

    def rounded(self, x: Tensor) -> Tensor:
        """Round units, saturated."""
        return self.codes(x).float()


FORMAT = Fp8(
    runtime=fp8.FORMAT,
    other_bytes=2,
    channel_bytes=4,
    rate="fp8",
    since=89,
    stored="float8e4m3fn",
    inputs=("float8e4m3fn",),
    tensorrt="FP8",
    plan=("fp8_e4m3",),
    rounding=0.02,  # on the default model 8e-3 in whole
    largest=448.0,
)
