"""The formats that linear layers can be quantized to, by name."""

from __future__ import annotations

from torch import Tensor

from export.formats import FORMATS as ALL
from export.formats.quantized import QuantizedFormat
from export.quantize.rounding import Quantized

FORMATS = {name: fmt for name, fmt in ALL.items() if isinstance(fmt, QuantizedFormat)}


def quantize(weight: Tensor, fmt: str) -> Quantized:
    """Round a float32 weight [K, N] to a format."""
    return FORMATS[fmt].quantize(weight)


def dequantize(q: Quantized, fmt: str) -> Tensor:
    """Return what a stored weight stands for: float32 [K, N]."""
    return FORMATS[fmt].dequantize(q.codes, q.scale, q.tensor_scale)


def dequantized(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, fmt: str) -> Tensor:
    """`dequantize` on loose tensors."""
    return FORMATS[fmt].dequantize(codes, scale, tensor_scale)


def round_activations(x: Tensor, scale: Tensor, fmt: str) -> Tensor:
    """Return what is left of an activation [..., K] after its format, in float32."""
    return FORMATS[fmt].round_activations(x, scale)


def activation_scale(largest: float, fmt: str) -> float:
    """Return the scale with which values up to `largest` are just held."""
    return FORMATS[fmt].input_scale(largest)
