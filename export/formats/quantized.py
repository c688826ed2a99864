"""A format whose weights, and mostly inputs, are rounded to few values between scales.

Torch is imported where a weight is rounded: planning and compiling need none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.formats.base import Format

if TYPE_CHECKING:
    from torch import Tensor

    from export.quantize.rounding import Quantized


@dataclass(frozen=True, kw_only=True)
class QuantizedFormat(Format, ABC):
    """One way to quantize a linear layer.

    Attributes:
        block: inputs that share a scale; None for one scale per output channel.
        largest: of a code's value, for weights and activations alike.
        unit: of an input's range, what its scale is over; None takes `largest`.
        even: whether values are evenly spaced, so that clipping may pay and errors can be foretold.
        calibrated: whether layers need statistics of their inputs.
        packed: whether graphs store codes in fewer bits than torch can.
        scaled_whole: whether one scale spans all outputs, so that none can be quantized alone.
    """

    block: int | None = None
    largest: float
    unit: float | None = None
    even: bool = False
    calibrated: bool = True
    packed: bool = False
    scaled_whole: bool = False

    @abstractmethod
    def quantize(self, weight: Tensor) -> Quantized:
        """Round a float32 weight [K, N]."""

    @abstractmethod
    def dequantize(self, codes: Tensor, scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Return what a stored weight stands for: float32 [K, N]."""

    @abstractmethod
    def round_activations(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return what is left of an activation [..., K]; `scale` is [] float32, of one unit."""

    def input_scale(self, largest: float) -> float:
        """Return the scale with which values up to `largest` are just held."""
        from export.quantize.rounding import SMALLEST

        return max(largest / (self.unit or self.largest), SMALLEST)


@dataclass(frozen=True, kw_only=True)
class PerOutput(QuantizedFormat, ABC):
    """One scale per output, and one of the whole input."""

    @abstractmethod
    def codes(self, x: Tensor) -> Tensor:
        """Round units to what is stored; `x` may be overwritten."""

    @abstractmethod
    def rounded(self, x: Tensor) -> Tensor:
        """Round units, saturated: float32."""

    def quantize(self, weight: Tensor) -> Quantized:
        """Round a float32 weight [K, N]."""
        from export.quantize.rounding import SMALLEST, Quantized, largest_of_outputs

        scale = (largest_of_outputs(weight) / self.largest).clamp(min=SMALLEST)
        return Quantized(self.codes(weight / scale), scale)

    def dequantize(self, codes: Tensor, scale: Tensor, tensor_scale: Tensor | None) -> Tensor:
        """Return what a stored weight stands for: float32 [K, N]."""
        return codes.float().mul_(scale)  # in place: this is the largest tensor of a build

    def round_activations(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return what is left of an activation [..., K]."""
        return self.rounded(x / scale) * scale
