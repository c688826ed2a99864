"""nvfp4: E2M1 in blocks of 16, each with an E4M3 scale. Graphs for a CPU hold codes of 4 bits."""

from __future__ import annotations

from bifrost_rt.formats.base import Format
from bifrost_rt.manifest import Deviation

FORMAT = Format(
    "nvfp4",
    dtype="uint4",
    weight_bits=4.5,
    order=5,
    computes_in="float4_e2m1fn",
    quantized=True,
    # simulated against the graphs that drew the image of the demo model: 32.1 dB; its image
    # from another seed has 28 to 30 dB, so the two cannot be told apart
    deviation=Deviation(29.0, 8.0),
    in_memory={"onnxruntime": 40.0},  # measured on 24 layers of width 2048: 39
)
