"""fp8: E4M3, a scale per output, and one of the input from calibration."""

from __future__ import annotations

from bifrost_rt.formats import fp8
from export.formats.base import Format

FORMAT = Format(
    runtime=fp8.FORMAT,
    other_bytes=2,
    channel_bytes=4,
    rate="fp8",
    since=89,
    stored="float8e4m3fn",
    inputs=("float8e4m3fn",),
    tensorrt="FP8",
    plan=("fp8_e4m3",),
    rounding=0.02,  # on the default model 8e-3 in whole
)
