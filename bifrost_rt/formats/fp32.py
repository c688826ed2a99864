"""fp32: IEEE single precision, which checkpoints are compared in."""

from __future__ import annotations

import math

from bifrost_rt.formats.base import Format
from bifrost_rt.manifest import Deviation

FORMAT = Format(
    "fp32",
    dtype="float32",
    weight_bits=32,
    order=0,
    computes_in="float32",
    deviation=Deviation(math.inf, 0.0),  # `selftest.TOLERANCE` alone
    # measured on an H200, benchmarks/results/gpu.md: 1.07; backends of CPUs know their own figure
    in_memory={"onnxruntime-cuda": 1.1},
    compared=True,
)
