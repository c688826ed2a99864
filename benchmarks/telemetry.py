"""What the machine did while a candidate drew: clocks, temperatures, power, energy.

Sources say what their device tells; what it does not tell is not there. A candidate's figures are
those of its own turns. They are the machine's all the same: whatever else ran then is in them, and
a turn that is shorter than a device's own averaging (NVIDIA: up to a second) borrows from its
neighbour's.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks import host, jetson, nvidia
from benchmarks.sensors import INTERVAL, Reading, Source

POWER, ENERGY = "_w", "_j"


@dataclass
class Log:
    """What was read in one candidate's turns."""

    seconds: float = 0.0
    samples: int = 0
    gauges: dict[str, list[float]] = field(default_factory=dict)
    limits: Counter[str] = field(default_factory=Counter)
    counters: dict[str, float] = field(default_factory=dict)

    def add(self, readings: Sequence[Reading]) -> None:
        """Return readings of all sources at one moment. What two of them tell is taken from the
        first."""
        self.samples += 1
        told: dict[str, float] = {}
        for reading in readings:
            told = {**reading.gauges, **told}
        for name, value in told.items():
            self.gauges.setdefault(name, []).append(value)
        self.limits.update({name for reading in readings for name in reading.limits})

    def summary(self, images: int) -> dict[str, Any]:
        """For the record; empty where nothing was told.

        Watts and joules per image come from a device's energy counter where it has one, else from
        the mean of its power times the length of the turns.
        """
        watts, joules = {}, {}
        for name, total in self.counters.items():
            if name.endswith(ENERGY):
                watts[name.removesuffix(ENERGY)] = total / self.seconds
                joules[name.removesuffix(ENERGY)] = total / images
        for name, values in self.gauges.items():
            rail = name.removesuffix(POWER)
            if name.endswith(POWER) and rail not in joules:
                watts[rail] = sum(values) / len(values)
                joules[rail] = watts[rail] * self.seconds / images
        found: dict[str, Any] = {
            name: {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}
            for name, values in self.gauges.items()
            if not name.endswith(POWER)
        }
        found |= {n: total for n, total in self.counters.items() if not n.endswith(ENERGY)}
        shares = {name: count / self.samples for name, count in sorted(self.limits.items())}
        found |= {"watts": watts, "joules_per_image": joules, "limited_by": shares}
        return {name: value for name, value in found.items() if value != {}}


class Telemetry:
    """All sources of this machine, read while a candidate draws."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources

    @contextmanager
    def turn(self, log: Log) -> Iterator[None]:
        """Read into `log` while the block runs, and once at its end."""
        for source in self._sources:
            source.read()  # what came before the turn belongs to nobody
        before = self._counters()
        over = threading.Event()
        thread = threading.Thread(target=self._follow, args=(log, over), daemon=True)
        start = time.perf_counter()
        thread.start()
        try:
            yield
        finally:
            log.seconds += time.perf_counter() - start
            after = self._counters()
            over.set()
            thread.join()
            for name, value in after.items():
                if name in before:
                    log.counters[name] = log.counters.get(name, 0.0) + value - before[name]

    def _follow(self, log: Log, over: threading.Event) -> None:
        while self._sources:
            ended = over.wait(INTERVAL)
            readings = [r for source in self._sources if (r := source.read()) is not None]
            if readings:
                log.add(readings)
            if ended:
                return

    def _counters(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for source in self._sources:
            found |= source.counters()
        return found

    def memory(self, pid: int) -> int | None:
        """Return the most device memory that a process was seen to hold, where that is told."""
        seen = [found for source in self._sources if (found := source.memory(pid)) is not None]
        return max(seen, default=None)

    def close(self) -> None:
        """Stop all sources."""
        for source in self._sources:
            source.close()


def open_all() -> Telemetry:
    """Every source that this machine has."""
    return Telemetry([*host.sources(), *nvidia.sources(), *jetson.sources()])
