"""What a candidate's process and the benchmark say to each other: a line of JSON each way.

A candidate says `{"ready": ABOUT}` when everything is loaded. Then it is asked:

    {"do": "run"}                    {"figures": {"step": SECONDS, ...}}
    {"do": "output", "to": PATH}     {"saved": PATH}      numpy's format, for a comparison
    {"do": "end"}                    {"peak_bytes": N}    and the process ends

`{"error": TEXT}` takes the place of any answer, and the process ends. This file is read in the
environments of peers too: it needs Python and numpy alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.peak_memory import peak_bytes


class Candidate(Protocol):
    """What a program makes of its settings.

    Attributes:
        about: versions and settings that decide the speed, for the record.
    """

    about: dict[str, Any]

    def run(self) -> dict[str, float]:
        """Do the work once; return seconds by figure."""

    def output(self) -> NDArray[Any]:
        """Return what it computes of the work's inputs, for a comparison."""


def serve(make: Callable[[Mapping[str, Any]], Candidate]) -> None:
    """Be a candidate's process: the settings are its one argument, in JSON.

    Libraries print where they like: what they write to standard output goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        candidate = make(json.loads(sys.argv[1]))
        say(ready={**candidate.about, "python": sys.version.split()[0]})
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["do"] == "end":
                say(peak_bytes=peak_bytes())
                return
            if asked["do"] == "output":
                np.save(asked["to"], candidate.output())
                say(saved=asked["to"])
            else:
                say(figures=candidate.run())
    except Exception as error:  # whatever a peer's library raises is its row of the table
        say(error=f"{type(error).__name__}: {error}")
        raise
