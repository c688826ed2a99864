"""int4: weights alone in 4 bits, with a scale per block of 32."""

from __future__ import annotations

from bifrost_rt.formats.base import Format

FORMAT = Format(
    "int4",
    dtype="int4",
    weight_bits=4.5,
    order=6,
    quantized=True,
    kernels=("MatMulNBits",),
    # measured on 24 layers of width 2048: 2.2 in onnxruntime, 3.06 in OpenVINO
    in_memory={"onnxruntime": 2.5, "openvino": 3.2},
)
