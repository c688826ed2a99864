"""nvfp4: E2M1 in blocks of 16, on Blackwell."""

from __future__ import annotations

from bifrost_rt.formats import nvfp4
from export.formats.base import Format

FORMAT = Format(
    runtime=nvfp4.FORMAT,
    other_bytes=2,
    rate="fp4",
    since=100,
    stored="uint4",
    inputs=("NVFP4QuantizeDequantize",),
    weight_function="NVFP4Dequantize",
    tensorrt="FP4",
    plan=("fp4_e2m1", "fp4"),
    rounding=0.04,  # on the default model 1.2e-2 in whole
)
