"""fp16: IEEE half precision, 11 bits of precision up to 65504."""

from __future__ import annotations

from bifrost_rt.formats.base import Format
from bifrost_rt.manifest import Deviation

FORMAT = Format(
    "fp16",
    dtype="float16",
    weight_bits=16,
    order=2,
    computes_in="float16",
    largest=65504.0,
    # simulated against the graphs that drew the image of the demo model: 67.8 dB
    deviation=Deviation(55.0, 0.3),
    # as for the other 16-bit format, which was measured
    in_memory={"onnxruntime": 2.45, "openvino": 4.3, "onnxruntime-cuda": 2.2},
    compared=True,
)
