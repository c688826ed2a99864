"""The plan that a TensorRT-RTX engine holds as text: its kernels and its constants.

The format is not documented; the tests that read it were written for 1.7.1 and fail, not pass,
where they find no plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_TEXT = re.compile(rb"header \{\n[\x09\x0a\x0d\x1b-\x7e]+")


@dataclass(frozen=True)
class Kernel:
    """One call of a kernel: its name, and the tensors that it reads."""

    name: str
    reads: tuple[str, ...]


def text(engine: bytes) -> str:
    """The longest plan of an engine, which is its network's."""
    return max((m.group(0) for m in _TEXT.finditer(engine)), key=len).decode("latin1")


def kernels(plan: str) -> list[Kernel]:
    """In their order."""
    calls = re.findall(r"function=\{ ?name=(\S+).*? input_args=\{([^}]*)\}", plan)
    return [Kernel(name, tuple(re.findall(r'"([^"]+)"', reads))) for name, reads in calls]


def constants(plan: str) -> dict[str, str]:
    """name -> type."""
    found = {}
    for line in plan.splitlines():
        if "const_payload_size" in line:
            named = re.search(r' name="([^"]+)".* type=(\w+)', line)
            assert named is not None, line
            found[named[1]] = named[2]
    return found
