"""The layer that stands where a linear layer stood."""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor, nn

from export import lazy_tensors
from export.lazy_tensors import LazyTensor
from export.quantize.formats import FORMATS, dequantized, quantize, round_activations
from export.quantize.rounding import Quantized

# Values that are quantized at once: a weight in float32, several times over, would be the most
# memory of a build. Up to 32 MiB, freed memory is used again; beyond, the system clears new pages.
AT_ONCE = 1 << 22
PARTS = ("codes", "scale", "tensor_scale")


class QuantizedLinear(nn.Module):
    """y = round(x · smoothing) @ dequantize(weight) + bias.

    Run in torch, it is the reference that the engine is compared with. The weight is quantized when
    it is read, from the source that the linear layer's weight has.

    Attributes:
        fmt: a name of `FORMATS`.
        codes, scale, tensor_scale: the stored weight [K, N], see `formats.Quantized`.
        input_scale: [] of the activations, or None where they are not quantized.
        smoothing: [K] factors that move outliers of the inputs into the weights, or None.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    input_scale: Tensor | None
    smoothing: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        fmt: str,
        input_scale: float | None = None,
        smoothing: Tensor | None = None,
    ) -> None:
        super().__init__()
        assert FORMATS[fmt].calibrated == (input_scale is not None)
        self.fmt = fmt
        self.in_features, self.out_features = linear.in_features, linear.out_features
        held = None if input_scale is None else torch.tensor(input_scale)
        self.register_buffer("input_scale", held)
        self.register_buffer("smoothing", smoothing)
        self._register_stored(lazy_tensors.of(linear, "weight"))
        self.bias = linear.bias
        if linear.bias is not None and "bias" in lazy_tensors.lazy(linear):
            lazy_tensors.attach(self, "bias", lazy_tensors.of(linear, "bias"))

    def _register_stored(self, weight: LazyTensor) -> None:
        shape = (self.in_features, self.out_features)
        # shapes and dtypes, from a weight of zeros that takes no memory
        outline = quantize(torch.zeros(shape, device="meta"), self.fmt)
        for name in PARTS:
            self.register_buffer(name, getattr(outline, name))
        for name, source in _stored(weight, outline, self.fmt, self.smoothing).items():
            lazy_tensors.attach(self, name, source)

    @property
    def weight(self) -> Tensor:
        """Nothing, in the dtype that it computes in, which T5 asks its layers for."""
        return torch.empty(0, dtype=torch.float32)

    def as_linear(self) -> nn.Linear:
        """Return the layer that this one stands for, without values."""
        bias = self.bias is not None
        return nn.Linear(self.in_features, self.out_features, bias, device="meta").eval()

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        if self.smoothing is not None:
            x = x * self.smoothing
        if self.input_scale is not None:
            x = round_activations(x, self.input_scale, self.fmt)
        weight = dequantized(self.codes, self.scale, self.tensor_scale, self.fmt)
        y = torch.matmul(x, weight)
        return y if self.bias is None else y + self.bias


# Parts that were computed and not read yet, by the identity of their source, of one weight at a
# time: codes and scales come from one computation, and are asked for one by one.
_unread: dict[str, Tensor] = {}


def _stored(
    weight: LazyTensor, outline: Quantized, fmt: str, smoothing: Tensor | None
) -> dict[str, LazyTensor]:
    """Return the parts of a stored weight, from the source of the weight [N, K]."""
    what = fmt
    if smoothing is not None:
        what += f" after {hashlib.sha256(smoothing.numpy().tobytes()).hexdigest()}"
    empty = {name: getattr(outline, name) for name in PARTS}
    keys = {n: f"{n} of {what}({weight.identity})" for n, part in empty.items() if part is not None}

    def quantized(rows: Tensor) -> Quantized:
        values = rows.float().T.contiguous()
        return quantize(values if smoothing is None else values / smoothing[:, None], fmt)

    def compute() -> dict[str, Tensor]:
        values = weight.read()
        if FORMATS[fmt].scaled_whole:
            whole = quantized(values)
            return {name: getattr(whole, name) for name in keys}
        found = {name: torch.empty_like(empty[name], device="cpu") for name in keys}
        count = max(1, AT_ONCE // values.shape[1])
        for start in range(0, len(values), count):
            part = quantized(values[start : start + count])
            for name, into in found.items():
                into[..., start : start + count] = getattr(part, name)
        return found

    def read(name: str) -> Tensor:
        if (kept := _unread.pop(keys[name], None)) is not None:
            return kept
        found = compute()
        _unread.clear()
        _unread.update({key: found[n] for n, key in keys.items() if n != name})
        return found[name]

    return {
        name: LazyTensor(
            tuple(empty[name].shape), empty[name].dtype, key, functools.partial(read, name)
        )
        for name, key in keys.items()
    }
