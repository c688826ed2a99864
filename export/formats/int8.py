"""int8: a scale per output, and one of the input from calibration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bifrost_rt.formats import int8
from export.formats.quantized import PerOutput

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Int8(PerOutput):
    """The arithmetic."""

    def codes(self, x: Tensor) -> Tensor:
        """Round units to bytes."""
        return x.round_().char()

    def rounded(self, x: Tensor) -> Tensor:
        """Round units, saturated."""
        return x.round().clamp(-self.largest - 1, self.largest)


FORMAT = Int8(
    runtime=int8.FORMAT,
    other_bytes=2,
    channel_bytes=4,
    rate="int8",
    since=75,
    stored="int8",
    inputs=("uint8", "int8"),
    tensorrt="INT8",
    plan=("int8",),
    # Measured with random weights, as error over the root of the layers: 6.2e-3 with 28 of width
    # 1024, 5.4e-3 with 42 and 5.0e-3 with 196 of width 3584. What was trained is less sensitive: on
    # the default model 6e-3 in whole.
    rounding=0.01,
    # At the widths of real layers they go beyond float16's 65504: the plans of compiled engines
    # show it, and no GPU was asked.
    bare_sums=("tensorrt-rtx",),
    largest=127.0,
    even=True,
)
