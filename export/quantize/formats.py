"""The formats that linear layers can be quantized to, by name."""

from __future__ import annotations

from torch import Tensor

from export.formats import FORMATS as ALL
from export.formats.quantized import QuantizedFormat
from export.quantize.rounding import Quantised

FORMATS = {name: form for name, form in ALL.items() if isinstance(form, QuantizedFormat)}


def quantise(weight: Tensor, form: str) -> Quantised:
    """Round a float32 weight [K, N] to a format."""
    return FORMATS[form].quantise(weight)


def dequantise(q: Quantised, form: str) -> Tensor:
    """Return what a stored weight stands for: float32 [K, N]."""
    return FORMATS[form].dequantise(q.codes, q.scale, q.tensor_scale)


def dequantised(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, form: str) -> Tensor:
    """`dequantise` on loose tensors."""
    return FORMATS[form].dequantise(codes, scale, tensor_scale)


def round_activations(x: Tensor, scale: Tensor, form: str) -> Tensor:
    """Return what is left of an activation [..., K] after its format, in float32."""
    return FORMATS[form].round_activations(x, scale)


def activation_scale(largest: float, form: str) -> float:
    """Return the scale with which values up to `largest` are just held."""
    return FORMATS[form].input_scale(largest)
