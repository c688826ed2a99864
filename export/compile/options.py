"""What the command line can ask of compiling. Imports nothing that has to be installed."""

from __future__ import annotations

TITLES = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
COMPUTE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
WEIGHTS = ("baked", "bound")
