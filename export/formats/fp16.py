"""fp16: 16-bit weights, and arithmetic on all GPUs."""

from __future__ import annotations

from bifrost_rt.formats import fp16
from export.formats.base import Format

FORMAT = Format(
    runtime=fp16.FORMAT,
    other_bytes=2,
    rate="fp16",
    since=75,
    stored="float16",
    tensorrt="HALF",
    plan=("half",),
    safetensors="F16",
)
