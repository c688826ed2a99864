"""What a build takes of the machine, known before it begins: memory, which is kept to, and disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bifrost_rt import memory_plan
from bifrost_rt.memory_plan import size_text
from export import lazy_tensors, weight_offloading
from export.errors import BuildError
from export.planning.storage import Storage
from export.planning.trace import run_without_values
from export.planning.work import count_elements
from export.stages import Stage

# Python with torch and its company, and what tracing leaves behind: 346 MiB, and 124 MiB for the
# 517 modules of the golden model (benchmarks/results/streaming.md).
BASE = 400 << 20
TRACED = 1 << 18  # per module
# Of the largest tensor in float32: what its file holds, the value that is computed with, and one
# copy of either. Twice that was measured.
COPIES = 3
# Scratch memory of torch, and of the engine that it is compared with, which keeps its own.
SCRATCH = 2.5
# Of weights in float32: torch's, and the engine's with what it unpacks them from.
UNPACKED = 2.5
# Beside the weights: graphs, tokenizers, the image.
BESIDE = 32 << 20


@dataclass(frozen=True)
class Demand:
    """Of one build, in bytes.

    Attributes:
        base: memory of the process, whatever it computes.
        least: memory without which it cannot be done.
        everything: memory with which nothing is read twice.
        disk: of the finished set.
        stage, tensor: whose largest tensor decides `least`, and the bytes of that.
    """

    base: int
    least: int
    everything: int
    disk: int
    stage: str
    tensor: int


@dataclass(frozen=True)
class Share:
    """How a build divides its memory.

    Attributes:
        total: most that it takes.
        kept: of a network's weights, what stays in memory while torch runs it.
        engine: of an engine; a larger one is run in pieces.
        engines: of all that is open for the comparison.
    """

    total: int
    kept: int
    engine: int
    engines: int


def demand(stages: Iterable[Stage], sizes: Mapping[str, int], storage: Storage) -> Demand:
    """Return what building these stages takes.

    Args:
        sizes: of the run in which engines are compared with torch, symbol by symbol.
        storage: what the set is asked to be stored in.
    """
    base, most, worst, tensor, held, stored = BASE, 0, "", 0, 0, 0
    for stage in stages:
        largest = weight_offloading.largest(stage.module)
        with lazy_tensors.on_meta(stage.module):
            trace = run_without_values(stage, sizes)
            elements = count_elements(stage, trace)
        needs = round(SCRATCH * trace.scratch) + COPIES * largest
        if needs > most:
            most, worst, tensor = needs, stage.name, largest
        base += TRACED * sum(1 for _ in stage.module.modules())
        held += round(UNPACKED * elements.bytes_at(None))
        stored += elements.bytes_at(storage)
    return Demand(base, base + most, base + held + most, stored + BESIDE, worst, tensor)


def share(wanted: Demand, memory: int | None) -> Share:
    """Divide the memory that a build may take.

    Args:
        memory: bytes; None: what the machine has available.

    Raises:
        BuildError: it cannot be done with so little.
    """
    given = memory_plan.available() if memory is None else memory
    total = wanted.everything if given is None else min(given, wanted.everything)
    if total < wanted.least:
        least = size_text(wanted.least, up=True)
        raise BuildError(
            f"building takes at least {least} of memory: in float32 `{wanted.stage}` has a tensor "
            f"of {size_text(wanted.tensor)}; "
            + ("this machine has" if memory is None else "the budget is")
            + f" {size_text(total)}",
            hint="free memory, or build on a larger machine"
            if memory is None
            else f"give it at least {least}",
        )
    spare = total - wanted.least
    return Share(
        total=total,
        kept=spare // 2,
        engine=2 * wanted.tensor + spare // 2,
        engines=total - wanted.base,
    )


def check_disk(wanted: Demand, output: Path, there: int = 0) -> None:
    """Say whether the finished set has room on its disk.

    Args:
        there: bytes of it that are there already.

    Raises:
        BuildError: it has not.
    """
    place = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if wanted.disk - there > free:
        raise BuildError(
            f"{output}: the set will take {size_text(wanted.disk, up=True)}, its disk has "
            f"{size_text(free)} free",
            hint=f"free some space on the disk of {place}, or choose another --output",
        )
