"""The number formats: what a weight is stored as and what an activation is rounded to.

Everything is symmetric, zero is exact, and weights are [K, N]: K inputs, N outputs. Sources: ONNX
QuantizeLinear (opset 23) for rounding and saturation; OCP 8-bit and MX specifications for E4M3 and
E2M1; NVFP4 is E2M1 in blocks of 16 with an E4M3 scale per block and one float32 scale per tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT8_MAX = 127.0
INT4_MAX = 7.0
E4M3_MAX = 448.0
E2M1_MAX = 6.0
# the values of the codes 0…7; codes 8…15 are their negatives
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SMALLEST = 2.0**-126  # below it a scale is no normal float32


@dataclass(frozen=True)
class Format:
    """One way to quantise a linear layer.

    Attributes:
        weight_bits: per weight, scales of blocks included; scales per channel are not.
        block: inputs that share a scale; None for one scale per output channel.
        activations: "static" needs a calibrated scale per tensor, "dynamic" computes a scale per
            block at run time within a calibrated range, "none" leaves them as they are.
        largest: of a code's value, for weights and activations alike.
    """

    name: str
    weight_bits: float
    block: int | None
    activations: str
    largest: float

    @property
    def scaled_whole(self) -> bool:
        """Whether one scale spans all outputs, so that none can be quantised alone."""
        return self.name == "nvfp4"

    @property
    def calibrated(self) -> bool:
        """Whether layers of this format need statistics of their inputs."""
        return self.activations != "none"


FORMATS = {
    f.name: f
    for f in (
        Format("int8", 8.0, None, "static", INT8_MAX),
        Format("fp8", 8.0, None, "static", E4M3_MAX),
        Format("nvfp4", 4.5, 16, "dynamic", E2M1_MAX),
        Format("int4", 4.5, 32, "none", INT4_MAX),
    )
}


@dataclass(frozen=True)
class Quantised:
    """A weight as it is stored.

    Attributes:
        codes: [K, N]; int8 for int8 and int4, float8_e4m3fn for fp8, uint8 (E2M1 codes) for nvfp4.
        scale: [N] float32, or [K / block, N]: float16 for int4, float8_e4m3fn for nvfp4.
        tensor_scale: [] float32, of nvfp4 alone.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: Tensor | None = None


def quantise(weight: Tensor, form: str) -> Quantised:
    """A float32 weight [K, N] in a format."""
    if form == "int8":
        scale = (_largest(weight) / INT8_MAX).clamp(min=SMALLEST)
        return Quantised((weight / scale).round_().to(torch.int8), scale)
    if form == "fp8":
        scale = (_largest(weight) / E4M3_MAX).clamp(min=SMALLEST)
        return Quantised(to_e4m3(weight / scale), scale)
    block = FORMATS[form].block
    assert block is not None
    blocks = weight.unflatten(0, (-1, block))
    largest = blocks.abs().amax(1)
    if form == "int4":
        scale = _best_int4_scale(blocks, largest)
        codes = (blocks / scale.float()[:, None]).round().clamp(-INT4_MAX - 1, INT4_MAX)
        return Quantised(codes.flatten(0, 1).to(torch.int8), scale)
    tensor_scale = (largest.max() / (E2M1_MAX * E4M3_MAX)).clamp(min=SMALLEST)
    scale = to_e4m3(largest / E2M1_MAX / tensor_scale)
    wide = scale.float() * tensor_scale
    codes = e2m1_codes(blocks / wide.clamp(min=SMALLEST)[:, None])
    return Quantised(codes.flatten(0, 1), scale, tensor_scale)


def _largest(weight: Tensor) -> Tensor:
    """The largest magnitude of each output, without a copy of the weight."""
    return torch.maximum(weight.amax(0), -weight.amin(0))


def dequantise(q: Quantised, form: str) -> Tensor:
    """What a stored weight stands for: float32 [K, N]."""
    return dequantised(q.codes, q.scale, q.tensor_scale, form)


def dequantised(codes: Tensor, scale: Tensor, tensor_scale: Tensor | None, form: str) -> Tensor:
    """`dequantise` on loose tensors."""
    block = FORMATS[form].block
    if block is None:
        return codes.float().mul_(scale)  # in place: this is the largest tensor of a build
    if form == "int4":
        values, scale = codes.float(), scale.float()
    else:
        assert tensor_scale is not None
        magnitude = torch.tensor(E2M1_VALUES)[(codes & 7).long()]
        values = torch.where(codes >= 8, -magnitude, magnitude)
        scale = scale.float() * tensor_scale
    return values.unflatten(0, (-1, block)).mul_(scale[:, None]).flatten(0, 1)


def round_activations(x: Tensor, scale: Tensor, form: str) -> Tensor:
    """What is left of an activation after its format: float32 [..., K].

    Args:
        scale: [] float32; the value of one unit, for nvfp4 that of the block scales.
    """
    if form == "int8":
        return (x / scale).round().clamp(-INT8_MAX - 1, INT8_MAX) * scale
    if form == "fp8":
        return to_e4m3(x / scale).float() * scale
    assert form == "nvfp4"
    blocks = x.unflatten(-1, (-1, 16))
    wide = to_e4m3(blocks.abs().amax(-1, keepdim=True) / E2M1_MAX / scale).float() * scale
    return (to_e2m1(blocks / wide.clamp(min=SMALLEST)) * wide).flatten(-2)


def activation_scale(largest: float, form: str) -> float:
    """The scale with which values up to `largest` are just held."""
    unit = E2M1_MAX * E4M3_MAX if form == "nvfp4" else FORMATS[form].largest
    return max(largest / unit, SMALLEST)


def to_e4m3(x: Tensor) -> Tensor:
    """Rounded to E4M3, saturated: torch's own cast makes what is too large NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def to_e2m1(x: Tensor) -> Tensor:
    """The nearest E2M1 value, ties to even, saturated."""
    magnitude = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign((magnitude / step).round() * step, x)


def e2m1_codes(x: Tensor) -> Tensor:
    """The four bits of the nearest E2M1 value, as uint8."""
    rounded = to_e2m1(x)
    codes = torch.bucketize(rounded.abs(), torch.tensor(E2M1_VALUES, device=x.device))
    return torch.where(torch.signbit(rounded), codes + 8, codes).to(torch.uint8)


def _half(scale: Tensor) -> Tensor:
    """Scales in 16 bit: they are a ninth of what int4 stores."""
    return scale.clamp(min=2.0**-14).to(torch.float16)


def _best_int4_scale(blocks: Tensor, largest: Tensor) -> Tensor:
    """Per block, of a few clipped ranges the one with the smallest squared error: with fifteen
    levels, losing the largest weight's tip often pays for a finer step."""
    best, error = _half(largest), torch.full_like(largest, torch.inf)
    for share in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale = _half(largest * share / INT4_MAX)
        wide = scale.float()[:, None]
        codes = (blocks / wide).round().clamp(-INT4_MAX - 1, INT4_MAX)
        found = (codes * wide - blocks).square().sum(1)
        best = torch.where(found < error, scale, best)
        error = torch.minimum(found, error)
    return best
