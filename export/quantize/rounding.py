"""Rounding to numbers of 8 and 4 bits, in torch, and how a rounded weight is stored.

Everything is symmetric, zero is exact, and weights are [K, N]: K inputs, N outputs. Sources: ONNX
QuantizeLinear (opset 23) for rounding and saturation; OCP 8-bit and MX specifications for E4M3 and
E2M1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
# the values of the codes 0…7; codes 8…15 are their negatives
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SMALLEST = 2.0**-126  # below it a scale is no normal float32


@dataclass(frozen=True)
class Quantized:
    """A weight as it is stored.

    Attributes:
        codes: [K, N], of the type that the format stores, or of one byte where torch has none.
        scale: [N] float32, or [K / block, N] of a type that the format chooses.
        tensor_scale: [] float32, where the scales of blocks have one of their own.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None = None


def largest_of_outputs(weight: Tensor) -> Tensor:
    """Return the largest magnitude of each output, without a copy of the weight."""
    return torch.maximum(weight.amax(0), -weight.amin(0))


def to_e4m3(x: Tensor) -> Tensor:
    """Round to E4M3, saturated: torch's own cast makes what is too large NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(x: Tensor) -> Tensor:
    """Return the nearest E2M1 value, ties to even, saturated."""
    magnitude = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, x)


def e2m1_codes(x: Tensor) -> Tensor:
    """Return the four bits of the nearest E2M1 value, as uint8."""
    rounded = to_e2m1(x)
    codes = torch.bucketize(rounded.abs(), torch.tensor(E2M1_VALUES, device=x.device))
    return torch.where(torch.signbit(rounded), codes + 8, codes).to(torch.uint8)


def e2m1_values(codes: Tensor) -> Tensor:
    """Return what such bits stand for, in float32."""
    magnitude = torch.tensor(E2M1_VALUES)[(codes & 7).long()]
    return torch.where(codes >= 8, -magnitude, magnitude)
