"""How long a test waits for something that comes: no right answer takes so long on any machine,
however busy, and a hang takes longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

PATIENCE = 300.0  # seconds

T = TypeVar("T")


def until(ask: Callable[[], T]) -> T:
    """Ask again and again, and return the first answer that is true."""
    end = time.monotonic() + PATIENCE
    while not (answer := ask()):
        assert time.monotonic() < end, f"still {answer!r}"
        time.sleep(0.02)
    return answer
