"""Who takes part, with what, and what they are to compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.peers.environments import Environment

PROGRAMS = "benchmarks.peers.programs"


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        precision: those of one precision are compared with each other: "8 bit", "bfloat16",
            "float32".
        program: the module that is run, which serves `benchmarks.peers.protocol`.
        environment: a peer's; None: this one, and the candidate is ours.
        settings: what the program is given.
    """

    name: str
    precision: str
    program: str
    environment: Environment | None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is this project's runtime."""
        return self.environment is None


@dataclass(frozen=True)
class Work:
    """The same work for several candidates.

    Attributes:
        figures: name -> what it is, for the table. All are seconds.
        sizes: of the work, for the record.
        reference: name of the candidate whose output the others' are compared with.
    """

    name: str
    figures: Mapping[str, str]
    sizes: Mapping[str, Any]
    reference: str
    candidates: Sequence[Candidate]
