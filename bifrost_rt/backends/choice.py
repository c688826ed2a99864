"""Which driver a set gets where nobody names one: the fastest that is installed, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bifrost_rt import backends
from bifrost_rt.manifest import Manifest

# OpenVINO refuses to simulate these: it rounds a tenth of all values to the other neighbour in
# E4M3, and has no functions of a model.
SIMULATED = {"fp8", "nvfp4"}
# On a processor with a matrix unit for 8 bit, OpenVINO runs int8 layers at twice onnxruntime's
# speed. Elsewhere the two are equal in float32 and onnxruntime is a little ahead in int8
# (benchmarks/results/latency-cpu.json), opens faster and takes half of the memory
# (benchmarks/results/residency.md).
MATRIX_UNIT = "amx_int8"


@dataclass(frozen=True)
class Choice:
    """A driver's name and the reason for it, as one phrase."""

    name: str
    reason: str


def choose(manifest: Manifest, features: frozenset[str] | None = None) -> Choice:
    """The driver for a set.

    Args:
        features: of the processor, as Linux calls them; None asks this machine.
    """
    if manifest.backend != "onnxruntime":
        return Choice(manifest.backend, "the set was built for it")
    formats = {form for spec in manifest.engines for form in spec.precision.layers}
    if simulated := sorted(SIMULATED & formats):
        return Choice("onnxruntime", f"the only one that simulates {' and '.join(simulated)}")
    has_unit = MATRIX_UNIT in (processor_features() if features is None else features)
    if "int8" in formats and has_unit:
        order, reason = ("openvino", "onnxruntime"), "the faster one for int8 on this processor"
    else:
        order = ("onnxruntime", "openvino")
        reason = "as fast as openvino here, in half of the memory"
    missing = backends.DRIVERS[order[0]].unavailable()
    if missing is None:
        return Choice(order[0], reason)
    if backends.DRIVERS[order[1]].unavailable() is None:
        return Choice(order[1], f"{order[0]} would be the choice, but {missing}")
    return Choice(order[0], reason)  # neither is there: opening it says what to do


def processor_features() -> frozenset[str]:
    """What Linux says that the processor has; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
