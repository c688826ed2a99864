"""From the work of each engine and a device's figures to a plan: memory, time, energy, and what
gives where something does not fit.

Time is a roofline: the larger of arithmetic over the peak rate and bytes over the bandwidth, stage
by stage. Nothing is faster; kernels, launches and loading come on top.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from bifrost_rt import memory_plan
from bifrost_rt.errors import BudgetError
from bifrost_rt.memory_plan import Requirement, Step, size_text
from export.formats import FORMATS, FULL, HALF
from export.planning.devices import Device
from export.planning.storage import Storage
from export.planning.work import Work

InMemory = Callable[[Work, int], int]


@dataclass(frozen=True)
class StagePlan:
    """One engine. Bytes and seconds; seconds and limit are None where the device's figures are not
    known."""

    engine: str
    weight_bytes: int
    weights_in_memory: int
    kv_bytes: int
    tensor_bytes: int
    activation_bytes: int
    peak_bytes: int
    evict: tuple[str, ...]
    load: bool
    calls: int
    flops: int
    seconds: float | None
    limit: str | None


@dataclass(frozen=True)
class Plan:
    """An image on a device, or several at once.

    Attributes:
        images: that are drawn at once.
        fits: whether it can run within the budget.
        peak_bytes: most memory at once; where it does not fit, what the largest stage needs.
        resident_bytes: what it takes to keep every engine in memory.
        load_bytes: weights that each run after the first loads anew, for all its images, in the
            mean of several.
        seconds, joules: at least; None where a figure is not known.
        limit: what most of the time goes to.
        changes: what does not fit or has to give, and what to change.
        tokens_per_second: of an answer in words, at most: none is faster than its weights are read.
            None where a figure is not known.
        answer_cache_bytes: keys and values of the longest conversation.
    """

    device: str
    precision: str
    budget_bytes: int
    fits: bool
    peak_bytes: int
    resident_bytes: int
    load_bytes: int
    seconds: float | None
    joules: float | None
    limit: str | None
    stages: tuple[StagePlan, ...]
    changes: tuple[str, ...]
    tokens_per_second: float | None = None
    answer_cache_bytes: int = 0
    images: int = 1


def plan(
    works: Sequence[Work],
    device: Device,
    storage: Storage | None,
    budget: int | None = None,
    in_memory: InMemory | None = None,
    prefetch: bool = False,
    scratch_share: float = 1.0,
    ideal: Mapping[str, tuple[float, str]] | None = None,
    images: int = 1,
) -> Plan:
    """Plan one run.

    Args:
        storage: the precision of the weights; None for that of a built set.
        budget: bytes, instead of the device's.
        in_memory: (engine, stored bytes) -> bytes once a backend has opened it. Default: as stored,
            which is what a compiled engine takes on a GPU.
        prefetch: whether the backend opens the next engine while one works.
        scratch_share: what it takes of the scratch memory that is counted.
        ideal: engine -> least seconds of a call and their limit, where its kernels are known; None
            counts a roofline at one rate for each engine.
        images: that the works were counted for.
    """
    budget = device.memory if budget is None else budget
    keep = in_memory or (lambda work, stored: stored)
    # without a driver of its own, a device computes in 16 bit where weights have 16 bit or fewer
    at = None if in_memory else storage
    needs = _needs(works, storage, keep, at, scratch_share)
    try:
        steps, later = memory_plan.schedules_of(needs, budget, prefetch=prefetch)
    except BudgetError:
        steps, later = (), ()
    supported = not _lacking(device, storage)
    stages = tuple(
        _stage(work, need, step, storage, device, ideal)
        for work, need, step in zip(works, needs, steps or (None,) * len(needs), strict=True)
    )
    seconds = _total([stage.seconds for stage in stages])
    watts = device.value("watts")
    result = Plan(
        device=device.title,
        precision=storage.name if storage else "as built",
        budget_bytes=budget,
        fits=bool(steps) and supported,
        peak_bytes=max([*(s.peak_bytes for s in stages), *(step.peak for step in later)]),
        resident_bytes=sum(n.resident for n in needs) + max(n.tensors for n in needs),
        load_bytes=_loaded(works, needs, budget, storage, prefetch) if steps else 0,
        seconds=seconds,
        joules=None if seconds is None or watts is None else seconds * watts,
        limit=_main_limit(stages),
        stages=stages,
        changes=(),
        tokens_per_second=_tokens_per_second(works, storage, device),
        answer_cache_bytes=sum(w.answers.cache for w in works if w.answers),
        images=images,
    )
    return replace(result, changes=_changes(result, works, needs, device, storage, budget, keep))


def _needs(
    works: Sequence[Work],
    storage: Storage | None,
    keep: InMemory,
    at: Storage | None,
    share: float = 1.0,
) -> list[Requirement]:
    """Return what each engine takes.

    Args:
        at: decides the bytes of scratch memory; None: `share` of what is counted.
    """
    return [
        Requirement(
            w.engine,
            keep(w, w.weights(storage)),
            round(w.scratch * (share if at is None else at.of(w.engine).activation_scale)),
            w.tensors,
        )
        for w in works
    ]


def _tokens_per_second(
    works: Sequence[Work], storage: Storage | None, device: Device
) -> float | None:
    bandwidth = device.value("bandwidth")
    moved = sum(w.answers.read(w.weights(storage), storage, w.elements) for w in works if w.answers)
    return None if bandwidth is None or not moved else bandwidth * 1e9 / moved


def _loaded(
    works: Sequence[Work],
    needs: Sequence[Requirement],
    budget: int,
    storage: Storage | None,
    prefetch: bool,
) -> int:
    """Return bytes of weights that a run loads after a first one: schedules may take turns."""
    stored = {work.engine: work.weights(storage) for work in works}

    def steps(here: Mapping[str, int]) -> Sequence[Step]:
        return memory_plan.schedule(needs, budget, here, prefetch=prefetch)

    first = memory_plan.left_by(steps({}), needs, {})
    return round(memory_plan.loads(steps, needs, first, stored) / memory_plan.AHEAD)


def _stage(
    work: Work,
    need: Requirement,
    step: Step | None,
    storage: Storage | None,
    device: Device,
    ideal: Mapping[str, tuple[float, str]] | None,
) -> StagePlan:
    stored = work.weights(storage)
    if ideal is None:
        seconds, limit = _roofline(work, stored, storage, device)
    elif work.engine in ideal:
        seconds, limit = ideal[work.engine]
        seconds *= work.calls
    else:
        seconds, limit = None, None
    return StagePlan(
        engine=work.engine,
        weight_bytes=stored,
        weights_in_memory=need.weights,
        kv_bytes=work.cache,
        tensor_bytes=work.tensors,
        activation_bytes=need.scratch,
        peak_bytes=step.peak if step else need.total,
        evict=step.evict if step else (),
        load=step.load if step else True,
        calls=work.calls,
        flops=work.calls * work.flops,
        seconds=seconds,
        limit=limit,
    )


def _roofline(
    work: Work, stored: int, storage: Storage | None, device: Device
) -> tuple[float | None, str | None]:
    rate = device.value(_rate(work, storage))
    bandwidth = device.value("bandwidth")
    if rate is None or bandwidth is None:
        return None, None
    return least_seconds(work, stored + work.tensors, rate, bandwidth)


def least_seconds(work: Work, moved: int, rate: float, bandwidth: float) -> tuple[float, str]:
    """All calls of an engine at once the peak rate and the whole bandwidth, and which of the two
    is the limit.

    Args:
        moved: bytes that each call moves between memory and processor.
        rate: 10^12 operations a second.
        bandwidth: GB/s.
    """
    compute = work.flops / (rate * 1e12)
    memory = moved / (bandwidth * 1e9)
    return work.calls * max(compute, memory), "compute" if compute >= memory else "bandwidth"


def _rate(work: Work, storage: Storage | None) -> str:
    """8 bit and fewer apply to linear layers; an engine of convolutions computes in 16 bit."""
    if storage is None:
        return FULL.rate
    kind = work.elements.most(storage).rate if work.elements else storage.of(work.engine).rate
    return kind if work.linear or kind == FULL.rate else HALF.rate


def _lacking(device: Device, storage: Storage | None) -> list[str]:
    """Return the arithmetic that is asked for and that a device does not have."""
    if storage is None or not device.known_rates:
        return []
    asked = dict.fromkeys(declared.rate for declared in storage.formats)
    return [rate for rate in asked if rate != FULL.rate and device.value(rate) is None]


def _total(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


def _main_limit(stages: Sequence[StagePlan]) -> str | None:
    spent: dict[str, float] = {}
    for stage in stages:
        if stage.limit is not None and stage.seconds is not None:
            spent[stage.limit] = spent.get(stage.limit, 0.0) + stage.seconds
    return max(spent, key=lambda limit: spent[limit]) if spent else None


def _changes(
    result: Plan,
    works: Sequence[Work],
    needs: Sequence[Requirement],
    device: Device,
    storage: Storage | None,
    budget: int,
    keep: InMemory,
) -> tuple[str, ...]:
    said = []
    said += [f"{device.title} has no {rate} arithmetic" for rate in _lacking(device, storage)]
    for need in needs:
        if need.total > budget:
            said.append(
                f"`{need.engine}` needs {size_text(need.total)} by itself, "
                f"the budget is {size_text(budget)}"
            )
    leaving = [stage for stage in result.stages if stage.evict]
    if result.fits and not leaving:
        return ()
    if result.fits:
        said.append(
            f"not everything stays in memory, which would take {size_text(result.resident_bytes)}: "
            + "; ".join(
                f"{', '.join(f'`{engine}`' for engine in stage.evict)} must leave before "
                f"`{stage.engine}`"
                for stage in leaving
            )
        )
        said.append(_loads(result))
    if storage is not None:
        said += _smaller(result.fits, works, device, storage, budget, keep)
    if not result.fits:
        least = max(need.total for need in needs)
        said.append(f"at this precision the least memory is {size_text(least, up=True)}")
    return tuple(said)


def _loads(result: Plan) -> str:
    if result.images == 1:
        return f"every further image loads {size_text(result.load_bytes)} of weights"
    each = size_text(round(result.load_bytes / result.images))
    return (
        f"every further run of {result.images} images loads {size_text(result.load_bytes)} of "
        f"weights, {each} an image"
    )


def _smaller(
    fits: bool,
    works: Sequence[Work],
    device: Device,
    storage: Storage,
    budget: int,
    keep: InMemory,
) -> list[str]:
    """Return the precisions that would fit, or, where it fits already, would keep everything in
    memory."""
    found = []
    for other in FORMATS.values():
        uniform = Storage(other, storage.fallback)
        if other.linear_bits >= storage.precision.linear_bits or _lacking(device, uniform):
            continue
        needs = _needs(works, uniform, keep, uniform)
        try:
            steps = memory_plan.schedule(needs, budget)
        except BudgetError:
            continue
        if not fits:
            worst = max(needs, key=lambda need: need.total)
            found.append(
                f"{other.name} fits: its largest stage is `{worst.engine}` with "
                f"{size_text(worst.total)}"
            )
        elif memory_plan.everything_fits(steps):
            found.append(f"at {other.name} everything stays in memory")
    return found
