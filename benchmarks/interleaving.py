"""How those that are compared take turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

# Seconds before each turn: threads of the candidate before go on spinning for a while, and would
# take the cores from the next one's first engines.
SETTLE = 0.3

T = TypeVar("T")


def to_and_fro(candidates: Sequence[T], number: int) -> Iterator[T]:
    """One round, each candidate after a moment of nothing. Every other round goes backwards, so
    that nobody always follows the same one."""
    for candidate in candidates if number % 2 == 0 else reversed(candidates):
        time.sleep(SETTLE)
        yield candidate
