"""What the command line can ask of compiling. Imports nothing that has to be installed."""

from __future__ import annotations

from export.formats import by_age

TITLES = {"tensorrt-rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
COMPUTE = {declared.name: declared.dtype for declared in by_age() if not declared.quantized}
WEIGHTS = ("baked", "bound")
