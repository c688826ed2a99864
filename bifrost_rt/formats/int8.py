"""int8: bytes that are multiplied as they are, with a scale per output and one of the input."""

from __future__ import annotations

from bifrost_rt.formats.base import Format
from bifrost_rt.manifest import Deviation

FORMAT = Format(
    "int8",
    dtype="int8",
    weight_bits=8,
    order=3,
    computes_in="int8",
    quantized=True,
    # simulated against the graphs that drew the image of the demo model: 49.8 dB
    deviation=Deviation(33.0, 5.0),
    kernels=("MatMulIntegerToFloat",),
    multiplies_bytes=True,
    # A bias joined to its multiplication hides it from the 8-bit kernels.
    disabled_optimizers=("MatMulAddFusion",),
    # Measured on 24 layers of width 2048: 1.14 in onnxruntime, where what stays in 16 bit comes on
    # top, and 2.47 in OpenVINO.
    in_memory={"onnxruntime": 1.4, "openvino": 2.6},
    # Measured on 12 layers of width 4096: 2.39 where 1.14 is without the precise mode. Weights are
    # made unsigned in memory, and reordered from there.
    precise_in_memory=2.65,
    compared=True,
)
