"""The number formats, against an independent implementation of the same standards."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from export import formats as declared
from export.quantize import formats, rounding
from export.quantize.formats import FORMATS


def values() -> torch.Tensor:
    """Random numbers, every half-way point of E2M1, both zeros, and far beyond the range."""
    torch.manual_seed(0)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 0.0, 7.0, 1e9])
    return torch.cat((torch.randn(4000) * 3, ties, -ties))


def test_e2m1_rounds_as_ml_dtypes_does() -> None:
    x = values()
    wanted = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(rounding.to_e2m1(x).numpy(), wanted)


def test_e2m1_codes_are_the_bits() -> None:
    x = values()
    wanted = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(rounding.e2m1_codes(x).numpy(), wanted)


def test_e4m3_saturates_where_torch_gives_nan() -> None:
    x = values() * 100
    wanted = x.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(rounding.to_e4m3(x).float().numpy(), wanted)


# Relative error of a normal weight: int8 by a step of max/127 (max is 3.4 sigma of 512), fp8 by
# its 3 bits of mantissa, the 4-bit formats by theirs.
@pytest.mark.parametrize(
    ("fmt", "error"), [("int8", 0.012), ("fp8", 0.03), ("int4", 0.1), ("nvfp4", 0.11)]
)
def test_a_weight_comes_back_with_the_error_of_its_bits(fmt: str, error: float) -> None:
    torch.manual_seed(1)
    weight = torch.randn(512, 96)
    back = formats.dequantize(formats.quantize(weight, fmt), fmt)
    found = float((back - weight).norm() / weight.norm())
    assert error / 3 < found < error


@pytest.mark.parametrize("fmt", FORMATS)
def test_zeros_and_one_huge_weight_stay_finite(fmt: str) -> None:
    weight = torch.zeros(64, 8)
    weight[5, 3] = 1e4
    back = formats.dequantize(formats.quantize(weight, fmt), fmt)
    assert torch.isfinite(back).all()
    assert back.count_nonzero() == 1
    assert back[5, 3] == pytest.approx(1e4, rel=0.01)


def test_int4_scales_are_the_best_of_those_tried() -> None:
    torch.manual_seed(2)
    weight = torch.randn(256, 64)
    q = formats.quantize(weight, "int4")
    plain = weight.unflatten(0, (-1, 32)).abs().amax(1) / 7
    naive = (weight.unflatten(0, (-1, 32)) / plain[:, None]).round() * plain[:, None]
    chosen = (formats.dequantize(q, "int4") - weight).square().sum()
    assert chosen < (naive.flatten(0, 1) - weight).square().sum()


def test_activations_of_nvfp4_have_a_scale_per_block() -> None:
    x = torch.cat((torch.full((1, 16), 600.0), torch.full((1, 16), 0.006)), dim=1)
    scale = torch.tensor(formats.activation_scale(600.0, "nvfp4"))
    found = formats.round_activations(x, scale, "nvfp4")
    # the second block is 100,000 times smaller: one scale for both would have lost it
    assert torch.allclose(found[:, :16], x[:, :16], rtol=1e-3)
    assert found[0, 20] == pytest.approx(0.006, rel=0.3)


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_activations_at_the_end_of_the_range_are_held_and_beyond_saturate(fmt: str) -> None:
    scale = torch.tensor(formats.activation_scale(3.0, fmt))
    found = formats.round_activations(torch.tensor([3.0, 30.0]), scale, fmt)
    assert found[0] == pytest.approx(3.0, rel=1e-5)
    assert found[1] <= 3.0 * 128 / 127 + 1e-5


def test_what_is_declared_can_be_built() -> None:
    assert list(FORMATS) == [f.name for f in declared.FORMATS.values() if f.quantized]
