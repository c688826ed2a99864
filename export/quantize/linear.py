"""The layer that stands where a linear layer stood."""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor, nn

from export import sources
from export.quantize import operators
from export.quantize.formats import FORMATS, Quantised, quantise

# Outputs that are quantised at once: a weight in float32, several times over, is the most memory
# that a build would take.
ROWS = 1024
EACH = ("codes", "scale")


class QuantizedLinear(nn.Module):
    """y = round(x · migration) @ dequantise(weight) + bias.

    Run in torch, it is the reference that the engine is compared with. The weight is quantised when
    it is read, from the source that the linear layer's weight has.

    Attributes:
        form: a name of `FORMATS`.
        codes, scale, tensor_scale: the stored weight [K, N], see `formats.Quantised`.
        input_scale: [] of the activations, or None where they are not quantised.
        migration: [K] factors that move outliers of the inputs into the weights, or None.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None
    input_scale: Tensor | None
    migration: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        form: str,
        input_scale: float | None = None,
        migration: Tensor | None = None,
    ) -> None:
        super().__init__()
        assert FORMATS[form].calibrated == (input_scale is not None)
        self.form = form
        self.in_features, self.out_features = linear.in_features, linear.out_features
        held = None if input_scale is None else torch.tensor(input_scale)
        self.register_buffer("input_scale", held)
        self.register_buffer("migration", migration)
        self._register_stored(sources.of(linear, "weight"))
        self.bias = linear.bias
        if linear.bias is not None and "bias" in sources.lazy(linear):
            sources.attach(self, "bias", sources.of(linear, "bias"))

    def _register_stored(self, weight: sources.Source) -> None:
        form, migration = self.form, self.migration
        what = form
        if migration is not None:
            what += f" after {hashlib.sha256(migration.numpy().tobytes()).hexdigest()}"

        def part(rows: Tensor) -> Quantised:
            values = rows.float().T.contiguous()
            return quantise(values if migration is None else values / migration[:, None], form)

        def stored(values: Tensor) -> Quantised:
            if FORMATS[form].scaled_whole:
                return part(values)
            parts = [part(rows) for rows in values.split(ROWS)]
            return Quantised(*(torch.cat([getattr(p, n) for p in parts], -1) for n in EACH))

        def one_of(name: str, values: Tensor) -> Tensor:
            found: Tensor = getattr(stored(values), name)
            return found

        shape = (self.in_features, self.out_features)
        # shapes and dtypes, from a weight of zeros that takes no memory
        outline = quantise(torch.zeros(shape, device="meta"), form)
        for name in ("codes", "scale", "tensor_scale"):
            empty = getattr(outline, name)
            self.register_buffer(name, empty)
            if empty is not None:
                source = weight.map(
                    f"{name} of {what}",
                    functools.partial(one_of, name),
                    shape=empty.shape,
                    dtype=empty.dtype,
                )
                sources.attach(self, name, source)

    @property
    def weight(self) -> Tensor:
        """One of its float tensors: T5 asks its layers for the dtype that they compute in."""
        return self.scale if self.tensor_scale is None else self.tensor_scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]"""
        if self.migration is not None:
            x = x * self.migration
        if self.input_scale is not None:
            x = operators.round_activations(x, self.input_scale, self.form)
        weight = operators.dequantise(self.codes, self.scale, self.tensor_scale, self.form)
        y = torch.matmul(x, weight)
        return y if self.bias is None else y + self.bias
