"""The fixed list that scores are measured on: 300 prompts, 50 per family, never trained on.

The list is a seeded function of this package; tests pin its digest, so that a score of one day
can be compared with a score of another.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache

import numpy as np

from scenes.captions import caption
from scenes.sampling import any_spec
from scenes.world import FAMILIES, Spec, kept_out

PER_FAMILY = 50
KEPT_OUT_PER_FAMILY = 20
WORDINGS = 2  # at most, of one meaning: training must be left with others


@dataclass(frozen=True)
class HeldOut:
    """One prompt with its meaning, the seed its image is drawn with, and whether its
    combination (not only its wording) was kept out of training."""

    prompt: str
    spec: Spec
    seed: int
    kept_out: bool


@cache
def heldout() -> tuple[HeldOut, ...]:
    """Return the 300 prompts in the order of the families."""
    rng = np.random.default_rng(20250805)
    chosen: list[HeldOut] = []
    worded: Counter[Spec] = Counter()
    for family in FAMILIES:
        seen: set[str] = set()
        quota = {True: KEPT_OUT_PER_FAMILY, False: PER_FAMILY - KEPT_OUT_PER_FAMILY}
        while any(quota.values()):
            spec = any_spec(rng, family)
            prompt = caption(spec, rng)
            out = kept_out(spec)
            if prompt not in seen and quota[out] and worded[spec] < WORDINGS:
                seen.add(prompt)
                worded[spec] += 1
                quota[out] -= 1
                chosen.append(HeldOut(prompt, spec, 1000 + len(chosen), out))
    return tuple(chosen)


@cache
def heldout_prompts() -> frozenset[str]:
    """Return the wordings that training must avoid."""
    return frozenset(item.prompt for item in heldout())
