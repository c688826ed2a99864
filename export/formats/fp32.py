"""fp32: what everything is compared with."""

from __future__ import annotations

from bifrost_rt.formats import fp32
from export.formats.base import Format

FORMAT = Format(
    runtime=fp32.FORMAT,
    other_bytes=4,
    rate="fp32",
    since=75,
    stored="float",
    tensorrt="FLOAT",
    plan=("float",),
    safetensors="F32",
)
