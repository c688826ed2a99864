"""The formats that linear layers can be quantized to, by name."""

from __future__ import annotations

from torch import Tensor

from export.formats import FORMATS as ALL
from export.formats.quantized import QuantizedFormat
from export.quantize.rounding import Quantized

FORMATS = {name: form for name, form in ALL.items() if isinstance(form, QuantizedFormat)}


def quantize(weight: Tensor, form: str) -> Quantized:
    """Round a float32 weight [K, N] to a format."""
    return FORMATS[form].quantize(weight)


def dequantize(q: Quantized, form: str) -> Tensor:
    """Return what a stored weight stands for: float32 [K, N]."""
    return FORMATS[form].dequantize(q.codes, q.scale, q.tensor_scale)


def dequantized(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, form: str) -> Tensor:
    """`dequantize` on loose tensors."""
    return FORMATS[form].dequantize(codes, scale, tensor_scale)


def round_activations(x: Tensor, scale: Tensor, form: str) -> Tensor:
    """Return what is left of an activation [..., K] after its format, in float32."""
    return FORMATS[form].round_activations(x, scale)


def activation_scale(largest: float, form: str) -> float:
    """Return the scale with which values up to `largest` are just held."""
    return FORMATS[form].input_scale(largest)
