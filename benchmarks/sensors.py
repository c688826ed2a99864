"""What a device tells of itself: the contract of a source, and a source that is a program."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

INTERVAL = 0.2  # seconds between two readings


@dataclass(frozen=True)
class Reading:
    """What a source says at one moment.

    Attributes:
        gauges: name -> value, a name ends in its unit: `gpu_w`, `gpu_sm_mhz`, `gpu_c`.
        limits: what holds the clocks down.
    """

    gauges: Mapping[str, float]
    limits: frozenset[str] = frozenset()


class Source(Protocol):
    """A device, or a program that prints what it reads of one."""

    def read(self) -> Reading | None:
        """Now; None where nothing came since the last call."""

    def counters(self) -> dict[str, float]:
        """Return what only grows, by name and unit: joules end in `_j`."""

    def memory(self, pid: int) -> int | None:
        """Return the most bytes of the device that a process was seen to hold; None: it does not
        tell."""

    def close(self) -> None:
        """Stop."""


class Lines:
    """A program that prints a line for every reading until it is ended.

    Args:
        parse: a line -> its reading, or None where it holds none.
    """

    def __init__(self, command: Sequence[str], parse: Callable[[str], Reading | None]) -> None:
        self._parse = parse
        self._latest: Reading | None = None
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (reading := self._parse(line)) is not None:
                self._latest = reading

    def read(self) -> Reading | None:
        """Return the last line, once."""
        latest, self._latest = self._latest, None
        return latest

    def counters(self) -> dict[str, float]:
        """None."""
        return {}

    def memory(self, pid: int) -> int | None:
        """Not told."""
        return None

    def close(self) -> None:
        """End the program."""
        self._process.terminate()
        self._process.wait()
        self._thread.join()
        assert self._process.stdout is not None
        self._process.stdout.close()


def output(*command: str) -> str | None:
    """Return what a program says, where it is there and succeeds."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() or None if done.returncode == 0 else None
