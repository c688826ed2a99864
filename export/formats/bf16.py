"""bf16: 16-bit weights, and arithmetic from Ampere on."""

from __future__ import annotations

from bifrost_rt.formats import bf16
from export.formats.base import Format

FORMAT = Format(
    runtime=bf16.FORMAT,
    other_bytes=2,
    rate="fp16",  # GPUs compute in both at one rate
    since=80,
    stored="bfloat16",
    tensorrt="BF16",
    plan=("bf16",),
    safetensors="BF16",
)
