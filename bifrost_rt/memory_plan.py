"""Which engines are in memory when, for a byte budget.

Policy alone: numbers in, a schedule out, nothing is opened here. `engines` follows the schedule,
and the planner (`export.plan`) draws up the same one for machines that are not there.

An engine takes two things: what it holds as long as it is open (weights, as its backend keeps them,
and the scratch memory of its arithmetic, which backends do not give back between runs), and the
tensors of its inputs and outputs while it runs.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bifrost_rt import dims, image_processor, schedules
from bifrost_rt.dims import DIMS, REVEALED, STEPS
from bifrost_rt.errors import BudgetError, RequestError, RequestTypeError
from bifrost_rt.manifest import EngineSpec, SetSpec, TensorSpec, stored_bytes

# Of the memory that a machine has available, what is left to everyone else.
MARGIN = 0.1
# The sizes for which a manifest states an engine's scratch memory; text is as long as it can be.
COUNTED_STEPS = 28
# Runs that a choice of what stays is judged by.
AHEAD = 6
MOST_STAYING = 12  # engines; of more, the sets are too many to try
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("KMGT", 1)
    for kind, base in (("", 1024), ("iB", 1024), ("B", 1000))
}

Sizes = Callable[[str], Mapping[str, int]]


@dataclass(frozen=True)
class Requirement:
    """One use of an engine. `weights + scratch` stay as long as it is open, `tensors` while it
    runs."""

    engine: str
    weights: int
    scratch: int = 0
    tensors: int = 0

    @property
    def resident(self) -> int:
        """Bytes that the open engine holds."""
        return self.weights + self.scratch

    @property
    def total(self) -> int:
        """Bytes that it takes to run it alone."""
        return self.resident + self.tensors


@dataclass(frozen=True)
class Step:
    """One engine in a run: what leaves, whether it must be loaded before it, what is loaded
    while it works, and the memory then."""

    engine: str
    evict: tuple[str, ...]
    load: bool
    peak: int
    prefetch: tuple[str, ...] = ()


def schedule(
    needs: Sequence[Requirement],
    budget: int,
    resident: Mapping[str, int] | None = None,
    *,
    prefetch: bool = False,
) -> tuple[Step, ...]:
    """Return what leaves and what arrives before each engine, so that memory stays within `budget`.

    Runs repeat, so the engine that leaves first is the one whose next use is farthest away,
    counted in a circle (Belady's rule): the engine that has just run before one that the next
    image needs sooner. What fits stays. Where engines are of very different sizes, it may load less
    to let a certain few stay and all others come and go beside them; then these few leave last. The
    engine that is next is loaded while the current one works, if there is room for both as they
    are: nothing leaves for it.

    Args:
        needs: one per engine, in the order of use; an engine is used once.
        budget: bytes.
        resident: bytes of the engines that are open when the run begins.
        prefetch: whether an engine may be loaded while another one works.

    Raises:
        BudgetError: an engine takes more than the budget by itself; nothing was loaded.
    """
    if too_large := [need for need in needs if need.total > budget]:
        worst = max(too_large, key=lambda need: need.total)
        names = ", ".join(f"`{need.engine}`" for need in too_large)
        raise BudgetError(
            f"memory budget {size_text(budget)}: engine `{worst.engine}` needs "
            f"{size_text(worst.total)} by itself ({size_text(worst.weights)} weights, "
            f"{size_text(worst.scratch)} scratch, {size_text(worst.tensors)} tensors)"
            + (f"; too large are {names}" if len(too_large) > 1 else ""),
            hint=f"give it at least {size_text(worst.total, up=True)}",
        )
    plain = _schedule(needs, budget, resident or {}, prefetch)
    if everything_fits(plain):
        return plain
    last = _staying(tuple(needs), budget)
    weights = {need.engine: need.weights for need in needs}

    def ahead(leave_last: frozenset[str]) -> int:
        def steps(here: Mapping[str, int]) -> tuple[Step, ...]:
            return _schedule(needs, budget, here, prefetch, leave_last)

        return loads(steps, needs, resident or {}, weights)

    if ahead(last) < ahead(frozenset()):
        return _schedule(needs, budget, resident or {}, prefetch, last)
    return plain


def _schedule(
    needs: Sequence[Requirement],
    budget: int,
    resident: Mapping[str, int],
    prefetch: bool,
    last: frozenset[str] = frozenset(),
) -> tuple[Step, ...]:
    """`schedule`, where the engines `last` leave after all others."""
    place = {need.engine: i for i, need in enumerate(needs)}
    here = dict(resident)
    steps = []
    for i, need in enumerate(needs):

        def distance(engine: str, now: int = i) -> int:
            return (place[engine] - now) % len(needs) if engine in place else len(needs)

        load = need.engine not in here
        here[need.engine] = max(need.resident, here.get(need.engine, 0))
        leaving: dict[str, int] = {}
        excess = sum(here.values()) + need.tensors - budget
        others = sorted(here.keys() - {need.engine}, key=lambda e: (e in last, -distance(e), e))
        for engine in others:
            if excess > 0:
                leaving[engine] = here.pop(engine)
                excess -= leaving[engine]
        if excess > 0:
            # an earlier, larger run left it more scratch memory than this one needs
            leaving[need.engine] = here[need.engine]
            excess += need.resident - here[need.engine]
            here[need.engine], load = need.resident, True
        # a small one that left before a large one may have left in vain
        for engine in sorted(leaving.keys() - {need.engine}, key=lambda e: (distance(e), e)):
            if excess + leaving[engine] <= 0:
                here[engine] = leaving.pop(engine)
                excess += here[engine]
        coming = [
            after.engine
            for after in (needs[i + 1 : i + 2] if prefetch else ())
            if after.engine not in here
            and sum(here.values()) + need.tensors + after.resident <= budget
        ]
        here.update((after.engine, after.resident) for after in needs if after.engine in coming)
        peak = sum(here.values()) + need.tensors
        steps.append(Step(need.engine, tuple(leaving), load, peak, tuple(coming)))
    return tuple(steps)


@functools.lru_cache(maxsize=64)
def _staying(needs: tuple[Requirement, ...], budget: int) -> frozenset[str]:
    """Return the engines that may always stay while each of the others comes by itself: of all such
    sets the one with most weights."""
    best: tuple[int, tuple[str, ...]] = (0, ())
    for count in range(1, min(len(needs), MOST_STAYING)):
        for stay in itertools.combinations(needs, count):
            held = sum(need.resident for need in stay)
            fits = all(
                held + need.tensors + (0 if need in stay else need.resident) <= budget
                for need in needs
            )
            if fits:
                names = tuple(need.engine for need in stay)
                best = max(best, (sum(need.weights for need in stay), names))
    return frozenset(best[1])


def loads(
    steps_of: Callable[[Mapping[str, int]], Sequence[Step]],
    needs: Sequence[Requirement],
    resident: Mapping[str, int],
    weights: Mapping[str, int],
) -> int:
    """Return bytes that `AHEAD` runs load, one after the other.

    Args:
        steps_of: bytes of the engines that are open -> the schedule of a run.
        resident: bytes of the engines that are open when the first begins.
        weights: bytes of each engine that count.
    """
    here, loaded = dict(resident), 0
    for _ in range(AHEAD):
        steps = steps_of(here)
        loaded += sum(weights[step.engine] for step in steps if step.load)
        loaded += sum(weights[engine] for step in steps for engine in step.prefetch)
        here = left_by(steps, needs, here)
    return loaded


def left_by(
    steps: Sequence[Step], needs: Sequence[Requirement], resident: Mapping[str, int]
) -> dict[str, int]:
    """Return what a run leaves in memory: engine -> bytes.

    Args:
        resident: what it has found there.
    """
    here = dict(resident)
    for step, need in zip(steps, needs, strict=True):
        here = {name: size for name, size in here.items() if name not in step.evict}
        here[need.engine] = max(need.resident, here.get(need.engine, 0))
    return here


def schedules_of(
    needs: Sequence[Requirement], budget: int, *, prefetch: bool = False
) -> tuple[tuple[Step, ...], tuple[Step, ...]]:
    """Of a first image, and of those after it, which find what it has left.

    Raises:
        BudgetError: as `schedule` does.
    """
    first = schedule(needs, budget, prefetch=prefetch)
    return first, schedule(needs, budget, left_by(first, needs, {}), prefetch=prefetch)


def largest(of: Sequence[Sizes]) -> Sizes:
    """Every symbol at its largest among several runs."""

    def at(engine: str) -> Mapping[str, int]:
        every = [sizes(engine) for sizes in of]
        return {symbol: max(sizes[symbol] for sizes in every) for symbol in every[0]}

    return at


def everything_fits(steps: Sequence[Step]) -> bool:
    """Say whether no engine ever leaves."""
    return not any(step.evict for step in steps)


def sizes(
    manifest: SetSpec,
    *,
    images: int = 1,
    prompts: int = 1,
    guided: bool = False,
    decoding_steps: int | None = None,
    num_inference_steps: int | None = None,
) -> Sizes:
    """Return what a run makes of the symbols of the engines' inputs and outputs: one image where
    nothing else is said. Texts count as long as they can be, and images to look at as large."""
    defaults = manifest.defaults
    common = dims.of_run(
        images=images,
        prompts=prompts,
        guided=guided,
        text_tokens=manifest.text.mllm.max_length,
        steps=num_inference_steps or defaults.num_inference_steps,
        **_largest_image(manifest),
    )
    asked = decoding_steps or defaults.decoding_steps
    tokens = manifest.model.num_visual_tokens
    decoding = {
        **common,
        STEPS: schedules.active_steps(tokens, asked),
        REVEALED: schedules.most_revealed(tokens, asked),
    }
    decoders = {spec.name for spec in manifest.engines if dims.decodes(spec)}
    return lambda engine: decoding if engine in decoders else common


def _largest_image(manifest: SetSpec) -> dict[str, int]:
    if manifest.vision is None:
        return {}
    largest = image_processor.limits(manifest.vision)
    return {"windows": largest.windows, "vision_tokens": largest.tokens}


def needs(
    manifest: SetSpec,
    order: Sequence[str],
    at: Sizes,
    weights_in_memory: Callable[[EngineSpec, int], int],
    scratch_share: float = 1.0,
    waiting: int = 1,
) -> list[Requirement]:
    """Return what each engine of a run takes, or of several that go through the engines side by
    side.

    Args:
        order: engines, in the order of use.
        at: engine -> a number for every symbol of its inputs and outputs.
        weights_in_memory: (engine, bytes of its files) -> bytes once its backend has opened it.
        scratch_share: what the backend takes of the scratch memory that the manifest states.
        waiting: how many runs there are. All but the one that an engine works for keep what earlier
            engines have left for later ones.
    """
    found = []
    for i, name in enumerate(order):
        spec = manifest.engine(name)
        stored = stored_bytes(manifest, spec)
        counted = scratch_bytes(spec, at(name), manifest.text.mllm.max_length)
        scratch = math.ceil(scratch_share * counted)
        if spec.compiled is not None and spec.compiled.activation_bytes:
            # the builder's word, for the largest run of its profile, whatever this one's size
            scratch = spec.compiled.activation_bytes
        weights = weights_in_memory(spec, stored)
        tensors = tensor_bytes(spec, at(name))
        if waiting > 1:
            # a run waits before the engine or behind it
            beside = max(_handed_on(manifest, order[:j], order[j:], at) for j in (i, i + 1))
            tensors += (waiting - 1) * beside
        found.append(Requirement(name, weights, scratch, tensors))
    return found


def scratch_bytes(spec: EngineSpec, sizes: Mapping[str, int], longest: int) -> float:
    """Scratch memory at `sizes`, at most.

    Args:
        longest: tokens of the prompt for which the manifest states it.
    """
    grown = growth(spec, sizes)
    if not spec.piece_scratch_bytes:
        return spec.scratch_bytes * grown + spec.square_bytes * (grown**2 - grown)
    # of a row it grows with the cache, whose every place attention has a score for
    short, long = spec.scratch_bytes / longest, spec.piece_scratch_bytes / dims.CHUNK
    slope = (long - short) / max(1, dims.CONTEXT - longest)
    cache = max(longest, sizes[dims.CACHE_TOKENS])
    rows = grown * sizes[dims.NEW_TOKENS]
    return rows * (short + slope * (cache - longest))


def _handed_on(manifest: SetSpec, before: Sequence[str], after: Sequence[str], at: Sizes) -> int:
    """Return bytes of what engines read that those before them have left."""
    left: set[str] = set()
    for name in before:
        spec = manifest.engine(name)
        left |= {tensor.name for tensor in spec.outputs} | set(spec.next_inputs.values())
    read = {
        t.name: tensor_size(t, at(name)) for name in after for t in manifest.engine(name).inputs
    }
    return sum(size for tensor, size in read.items() if tensor in left)


def growth(spec: EngineSpec, sizes: Mapping[str, int]) -> float:
    """By how much scratch memory grows, at most, from one image to `sizes`: with the images,
    with both branches of guidance, and with the steps where the engine computes all at once."""
    grows = [DIMS[name].rows for name in dims.used_by(spec) if name in DIMS]
    rows = max((dims.evaluate(rows, sizes) for rows in grows if rows is not None), default=1)
    steps = any(STEPS in t.shape for t in spec.outputs)
    return rows * max(1.0, sizes[STEPS] / COUNTED_STEPS if steps else 1.0)


def tensor_bytes(spec: EngineSpec, sizes: Mapping[str, int]) -> int:
    """Return bytes of the tensors of an engine's inputs and outputs."""
    return sum(tensor_size(tensor, sizes) for tensor in (*spec.inputs, *spec.outputs))


def tensor_size(tensor: TensorSpec, sizes: Mapping[str, int]) -> int:
    """Return bytes of a tensor."""
    return np.dtype(tensor.dtype).itemsize * math.prod(dims.shape_at(tensor.shape, sizes))


def parse(budget: int | str, name: str = "memory_budget", least: int = 1) -> int:
    """Return bytes of a number or of a text such as "8GiB", "7.5 GB" or "900M".

    Args:
        name: of the argument, for the error.

    Raises:
        RequestError, RequestTypeError: not a size, or none at all.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, str)):
        raise RequestTypeError(f"{name} must be bytes or a text like '8GiB', got {budget!r}")
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget)
        units = {unit.lower(): scale for unit, scale in _UNITS.items()}
        if match is None or match[2].lower() not in units:
            raise RequestError(
                f"{name} {budget!r} is not a size", hint="write it like 8GiB, 7.5GB or 900M"
            )
        budget = int(float(match[1]) * units[match[2].lower()])
    if budget < least:
        raise RequestError(
            f"{name} must be at least {least} byte{'' if least == 1 else 's'}, got {budget}"
        )
    return budget


def default_budget(free: int | None) -> int | None:
    """Return what a run may take of the memory that its device has free."""
    return None if free is None else int(free * (1 - MARGIN))


def host_memory() -> int | None:
    """Return bytes that this machine can give without swapping; None where it does not say. A
    container's own limit counts too."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        pass
    return max(0, free)


def available() -> int | None:
    """Return the default budget of what runs in this machine's own memory."""
    return default_budget(host_memory())


def size_text(size: int, up: bool = False) -> str:
    """Return bytes as a person reads them, in binary units; rounded up where they are a demand."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= scale:
            tenths = 10 * size / scale
            return f"{(math.ceil(tenths) if up else round(tenths)) / 10:g} {unit}"
    return f"{size} B"
