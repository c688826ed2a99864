"""bf16: 16 bit with the range of float32 and 8 bits of precision."""

from __future__ import annotations

from bifrost_rt.formats.base import Format
from bifrost_rt.manifest import Deviation

FORMAT = Format(
    "bf16",
    dtype="bfloat16",
    weight_bits=16,
    order=1,
    computes_in="bfloat16",
    # simulated against the graphs that drew the image of the demo model: 59.9 dB
    deviation=Deviation(47.0, 1.0),
    # Measured, benchmarks/results/residency.md: 2.42 in onnxruntime while opening, 4.24 in OpenVINO
    # after the first run; benchmarks/results/gpu.md: 2.15 on an H200.
    in_memory={"onnxruntime": 2.45, "openvino": 4.3, "onnxruntime-cuda": 2.2},
    compared=True,
)
