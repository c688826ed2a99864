"""How those that are compared take turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

# Seconds before each turn: threads of the contender before go on spinning for a while, and would
# take the cores from the next one's first engines.
SETTLE = 0.3

T = TypeVar("T")


def to_and_fro(contenders: Sequence[T], number: int) -> Iterator[T]:
    """One round, each contender after a moment of nothing. Every other round goes backwards, so
    that nobody always follows the same one."""
    for contender in contenders if number % 2 == 0 else reversed(contenders):
        time.sleep(SETTLE)
        yield contender
