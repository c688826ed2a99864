"""How long a call of a compiled engine may take: an estimate from the plan inside it.

Each kernel takes the larger of the bytes that it moves over the bandwidth and its operations over
the device's rate for their type, one after another. Caches are left out, of tables only the rows
that are gathered count, and launches, waits and imperfect kernels come on top. A GPU may be faster
or slower; nothing here was measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bifrost_rt import dims, memory_plan
from bifrost_rt.manifest import EngineSpec, Manifest
from export import formats
from export.compile import plan_report, plan_text
from export.compile.plan_report import Kernel
from export.compile.plan_text import EnginePlan
from export.errors import RecipeError
from export.planning.devices import Device

BANDWIDTH, COMPUTE = "bandwidth", "compute"
FROM_ONNX = "plan with the ONNX set that it was compiled from"


@dataclass(frozen=True)
class Calls:
    """One engine of a compiled set, as an image uses it.

    Attributes:
        calls: how often it runs for an image.
        kernels: of one call.
        least_bytes: see `plan_report.least_bytes`.
    """

    engine: str
    calls: int
    kernels: tuple[Kernel, ...]
    least_bytes: int

    @property
    def operations(self) -> int:
        """Of one call."""
        return sum(kernel.operations or 0 for kernel in self.kernels)


@dataclass(frozen=True)
class KernelTime:
    """Kernels of one engine that do the same: those of one name, and all products of one type.

    Attributes:
        label: what they do, such as "product int8".
        count: in one call.
        seconds: of one call, all of them; estimated.
        limit: "bandwidth" or "compute", of most of that time.
        layers: of the network, of the slowest of them.
        name: of that one.
    """

    label: str
    name: str
    count: int
    seconds: float
    limit: str
    bytes: int
    operations: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class EngineTime:
    """One engine.

    Attributes:
        seconds: of one call, estimated.
        arithmetic_seconds: its operations alone, at the rates of their types.
        ideal_seconds: the larger of that and its least bytes over the bandwidth.
        ideal_limit: "compute" or "bandwidth", whichever of the two is the larger.
        kernels: the slowest first.
    """

    engine: str
    calls: int
    seconds: float
    arithmetic_seconds: float
    ideal_seconds: float
    ideal_limit: str
    kernels: tuple[KernelTime, ...]


@dataclass(frozen=True)
class Estimate:
    """An image.

    Attributes:
        missing_rates: types whose rate is not known, so that their kernels count by bytes alone.
    """

    device: str
    seconds: float
    ideal_seconds: float
    engines: tuple[EngineTime, ...]
    missing_rates: tuple[str, ...]


def of_set(folder: Path, manifest: Manifest, at: memory_plan.Sizes) -> list[Calls]:
    """Read the plans of the engines of a compiled set that draw, on the set's backend.

    Args:
        at: engine -> a number for every symbol of its inputs and outputs.

    Raises:
        RecipeError: an engine has no plan that can be read, or not all of it is known.
    """
    names = dims.drawing(spec for spec in manifest.engines if spec.backend is None)
    return [_calls(folder, manifest.engine(name), at(name)) for name in names]


def _calls(folder: Path, spec: EngineSpec, sizes: Mapping[str, int]) -> Calls:
    assert spec.compiled is not None
    weights = [weight.name for weight in spec.compiled.weights]
    path = folder / spec.graph
    plan = plan_text.read(path)
    if plan is None:
        raise RecipeError(f"{path}: the engine holds no plan that can be read", hint=FROM_ONNX)
    return of_plan(plan, spec, sizes, weights, str(path))


def of_plan(
    plan: EnginePlan, spec: EngineSpec, sizes: Mapping[str, int], weights: Collection[str], of: str
) -> Calls:
    """Return what an engine's plan says of a call at sizes.

    Args:
        weights: inputs of the engine that are weights.
        of: whose plan it is, for the error.

    Raises:
        RecipeError: not all of it is known.
    """
    doors = (*spec.inputs, *spec.outputs)
    plan = plan.at({tensor.name: dims.shape_at(tensor.shape, sizes) for tensor in doors})
    kernels = plan_report.kernels(plan, weights)
    least = plan_report.least_bytes(plan, weights)
    unclear = [k.name for k in kernels if k.bytes is None or k.operations is None]
    if least is None or unclear:
        raise RecipeError(
            f"{of}: the engine's plan does not say what "
            f"{', '.join(unclear[:3]) or 'a weight'} moves or computes",
            hint=FROM_ONNX,
        )
    return Calls(spec.name, dims.calls(spec, sizes), tuple(kernels), least)


def estimate(calls: Sequence[Calls], device: Device) -> Estimate | None:
    """Estimate an image; None where the device's bandwidth or all of its rates are not known."""
    bandwidth = device.value("bandwidth")
    if bandwidth is None or not device.known_rates:
        return None
    missing: dict[str, None] = {}
    engines = tuple(_engine(one, device, bandwidth * 1e9, missing) for one in calls)
    return Estimate(
        device.title,
        sum(engine.calls * engine.seconds for engine in engines),
        sum(engine.calls * engine.ideal_seconds for engine in engines),
        engines,
        tuple(missing),
    )


def _engine(one: Calls, device: Device, bandwidth: float, missing: dict[str, None]) -> EngineTime:
    groups: dict[tuple[str, str], list[tuple[float, str, Kernel]]] = {}
    total = arithmetic = 0.0
    for kernel in one.kernels:
        rate = device.value(formats.rate_of(kernel.reads) or "")
        if kernel.operations and rate is None:
            missing[kernel.reads] = None
        compute = 0.0 if rate is None else (kernel.operations or 0) / (rate * 1e12)
        memory = (kernel.bytes or 0) / bandwidth
        seconds = max(compute, memory)
        total, arithmetic = total + seconds, arithmetic + compute
        group = groups.setdefault(
            (label(kernel), "" if kernel.kind == "product" else kernel.name), []
        )
        group.append((seconds, COMPUTE if compute >= memory else BANDWIDTH, kernel))
    least = one.least_bytes / bandwidth
    times = [_group(what, members) for (what, _), members in groups.items()]
    return EngineTime(
        one.engine,
        one.calls,
        total,
        arithmetic,
        max(arithmetic, least),
        COMPUTE if arithmetic >= least else BANDWIDTH,
        tuple(sorted(times, key=lambda time: -time.seconds)),
    )


def _group(what: str, members: Sequence[tuple[float, str, Kernel]]) -> KernelTime:
    limits = {
        limit: sum(seconds for seconds, found, _ in members if found == limit)
        for _, limit, _ in members
    }
    slowest = max(members, key=lambda member: member[0])[2]
    return KernelTime(
        what,
        slowest.name,
        len(members),
        sum(seconds for seconds, _, _ in members),
        max(limits, key=lambda limit: limits[limit]),
        sum(kernel.bytes or 0 for _, _, kernel in members),
        sum(kernel.operations or 0 for _, _, kernel in members),
        slowest.layers,
    )


def label(kernel: Kernel) -> str:
    """Return what a kernel does, in a few words."""
    if kernel.kind in ("product", "part of attention"):
        return f"{kernel.kind} {kernel.reads}"
    return {"weight": "weight moved", "other": "elementwise, norms, moves"}.get(
        kernel.kind, kernel.kind
    )
