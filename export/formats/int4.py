"""int4: weights alone, in blocks of 32; products are 16 bit."""

from __future__ import annotations

from bifrost_rt.formats import int4
from export.formats.base import Format

FORMAT = Format(
    runtime=int4.FORMAT,
    other_bytes=2,
    rate="fp16",
    since=80,
    stored="int4",
    tensorrt="INT4",
    plan=("int4",),
)
