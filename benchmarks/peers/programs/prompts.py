"""Prompts that no cache of an earlier one knows."""

from __future__ import annotations

from collections.abc import Sequence


def fresh(prompt: Sequence[int], number: int) -> list[int]:
    """Return a prompt for a numbered run: its first token differs from those of the runs before, so
    that a runtime which keeps what prompts begin with in common has nothing to take from."""
    return [(prompt[0] + number) % 256, *prompt[1:]]
