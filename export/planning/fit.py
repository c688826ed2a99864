"""`--fit`: the precision of every group of layers with which a set stays in memory, at the least
loss that was measured (`losses.json`).

Engines share a budget and nothing else, so the best choice is found exactly: of each engine the
choices that no other beats in both memory and loss, then those of all engines together. Where even
the fewest bits do not keep everything in memory, the choice is that with which an image loads
least, and what stays gets the bits that are left.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bifrost_rt import memory_plan
from bifrost_rt.memory_plan import size_text
from export.errors import RecipeError
from export.formats import FORMATS
from export.formats.base import Format
from export.planning import devices
from export.planning.devices import Device
from export.planning.estimate import InMemory
from export.planning.losses import Loss, Losses
from export.planning.storage import Storage, bytes_of
from export.planning.work import Work
from export.quantize import groups, policy

# What says how many bytes a backend holds of an engine that is stored so.
OfStorage = Callable[[Storage], InMemory]
Choice = Mapping[str, str]  # group of layers -> format


@dataclass(frozen=True)
class Group:
    """What was chosen for layers that have one precision together.

    Attributes:
        stored, in_16_bit: bytes as chosen, and without it.
        loss: as measured; None in 16 bit.
    """

    name: str
    fmt: str
    stored: int
    in_16_bit: int
    loss: Loss | None


@dataclass(frozen=True)
class Fitted:
    """Attributes:
    stays: whether everything stays in memory.
    needed: bytes with which everything stays, as chosen.
    least: the same with the fewest bits.
    better: bytes for which there is a choice of less loss; None where there is none.
    image: the sum of the losses.
    """

    device: Device
    storage: Storage
    groups: tuple[Group, ...]
    stays: bool
    needed: int
    least: int
    better: int | None
    image: float
    source: str

    def record(self) -> dict[str, Any]:
        """As JSON has it: what was chosen, and by which figures."""
        return {
            "device": self.device.title,
            "budget_bytes": self.device.memory,
            "stays": self.stays,
            "needed_bytes": self.needed,
            "least_bytes": self.least,
            "image_loss": self.image,
            "losses": self.source,
            "groups": [asdict(group) for group in self.groups],
            "stages": dict(self.storage.stages),
            "layers": dict(self.storage.layers),
        }


@dataclass(frozen=True)
class _Option:
    """One choice for one engine, or for several: bytes while it is open, bytes of its files."""

    choice: Choice
    resident: int
    stored: int
    loss: float


def device(text: str) -> Device:
    """Return what has to be fitted: a device of the table, this machine (`here`), or a size.

    Raises:
        RecipeError: neither a device nor a size.
    """
    if text[:1].isdigit():
        return Device(text, text, memory_plan.parse(text, "--fit"))
    return devices.find(text)


def choose(
    works: Sequence[Work],
    on: Device,
    losses: Losses,
    fallback: Format,
    in_memory: OfStorage | None = None,
    scratch_share: float | None = None,
) -> Fitted:
    """Choose a precision for every group of layers.

    Args:
        losses: the groups and formats that may be chosen, and what they cost.
        fallback: the 16 bit that everything else is stored in.
        in_memory: default: as stored, which is what a compiled engine takes on a GPU.
        scratch_share: of the scratch memory that is counted; default: what 16-bit arithmetic takes.

    Raises:
        RecipeError: an engine does not fit by itself, whatever is chosen.
    """
    share = fallback.activation_scale if scratch_share is None else scratch_share
    by_engine = {}
    for work in works:
        scratch = round(work.scratch * share)
        by_engine[work.engine] = _front(
            _option(work, choice, losses, fallback, in_memory, scratch)
            for choice in _choices(work, on, losses, fallback)
        )
    tensors = {work.engine: work.tensors for work in works}
    room = on.memory - max(tensors.values())
    least = sum(front[0].resident for front in by_engine.values()) + on.memory - room
    together = _together(by_engine.values())
    fitting = [option for option in together if option.resident <= room]
    best = fitting[-1] if fitting else _fewest_loads(by_engine, tensors, on)
    larger = [option.resident for option in together if option.loss < best.loss]
    storage = _storage(works, best.choice, fallback)
    return Fitted(
        device=on,
        storage=storage,
        groups=tuple(_described(works, best.choice, losses, fallback)),
        stays=bool(fitting),
        needed=best.resident + on.memory - room,
        least=least,
        better=min(larger) + on.memory - room if larger else None,
        image=best.loss,
        source=losses.source,
    )


def describe(fitted: Fitted) -> list[str]:
    """Return lines of text: what was chosen, and why."""
    where = f"{fitted.device.title}, {size_text(fitted.device.memory)}"
    lines = [f"fit to {where}: "]
    lines[0] += (
        f"everything stays in memory, {size_text(fitted.needed)}"
        if fitted.stays
        else f"not everything stays in memory, which takes {size_text(fitted.least, up=True)} with "
        "the fewest bits; chosen so that an image loads least"
    )
    rows = [("layers", "precision", "weights", "in 16 bit", "PSNR with these alone")]
    rows += [
        (
            group.name,
            group.fmt,
            size_text(group.stored),
            size_text(group.in_16_bit),
            "" if group.loss is None else _decibels(group.loss.image),
        )
        for group in fitted.groups
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append("  all other layers stay in 16 bit")
    lines.append(f"why: the least loss of all choices that fit, {_decibels(fitted.image)} together")
    if not fitted.stays:
        lines[-1] = (
            "why: the fewest bits for what an image loads; for what stays, the least loss that "
            f"fits; {_decibels(fitted.image)} together"
        )
    if fitted.better is not None and fitted.stays:
        lines.append(f"less would be lost with {size_text(fitted.better, up=True)}")
    lines.append(f"losses: {fitted.source}. Other models lose more or less than this one")
    return lines


def _decibels(loss: float) -> str:
    return "no loss" if loss == 0 else f"{-10 * math.log10(loss):.1f} dB"


def _layers(work: Work) -> dict[str, list[policy.Layer]]:
    """Return the layers of an engine that may give up bits, by group."""
    found: dict[str, list[policy.Layer]] = {}
    assert work.elements is not None
    for layer in work.elements.layers:
        if (group := groups.of(work.engine, layer)) is not None:
            found.setdefault(group, []).append(layer)
    return found


def _choices(work: Work, on: Device, losses: Losses, fallback: Format) -> Iterable[dict[str, str]]:
    """Yield every choice for an engine."""
    found = _layers(work)
    allowed = [
        [fallback.name, *_allowed(work, group, layers[0], on, losses)]
        for group, layers in found.items()
    ]
    for names in itertools.product(*allowed):
        yield dict(zip(found, names, strict=True))


def _allowed(work: Work, group: str, layer: policy.Layer, on: Device, losses: Losses) -> list[str]:
    """Return the quantized formats that a group may have: measured, known to the device, and of
    layers that stay in 16 bit otherwise, of the weights alone.

    Products of a loop decide its time: there, weights alone are quantized only where the device
    has no products of as few bits.
    """
    known = [
        FORMATS[name]
        for name in losses.groups.get(group, {})
        if name in FORMATS and _there(FORMATS[name], on)
    ]
    if layer.exception:
        return [declared.name for declared in known if not declared.runtime.rounds_activations]
    if work.calls > 1 and on.known_rates:
        fewest = min((f.code_bits for f in known if f.runtime.rounds_activations), default=math.inf)
        known = [f for f in known if f.runtime.rounds_activations or f.code_bits < fewest]
    return [declared.name for declared in known]


def _there(fmt: Format, on: Device) -> bool:
    """Say whether a device computes in a format; of one that is only a size, whether a CPU does."""
    if on.known_rates:
        return on.value(fmt.rate) is not None
    return not fmt.runtime.simulated


def _option(
    work: Work,
    choice: Choice,
    losses: Losses,
    fallback: Format,
    in_memory: OfStorage | None,
    scratch: int,
) -> _Option:
    storage = _storage([work], choice, fallback)
    stored = work.weights(storage)
    held = stored if in_memory is None else in_memory(storage)(work, stored)
    lost = sum(_lost(losses, group, fmt) for group, fmt in choice.items() if fmt != fallback.name)
    return _Option(choice, held + scratch, stored, lost)


def _lost(losses: Losses, group: str, fmt: str) -> float:
    return losses.groups[group][fmt].image


def _front(options: Iterable[_Option]) -> list[_Option]:
    """Return those that no other beats: from little memory and much loss to the opposite."""
    best: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.resident, o.loss)):
        if not best or option.loss < best[-1].loss:
            best.append(option)
    return best


def _together(fronts: Iterable[list[_Option]]) -> list[_Option]:
    """Return the choices for all engines that no other beats."""
    found = [_Option({}, 0, 0, 0.0)]
    for front in fronts:
        found = _front(
            _Option(
                {**one.choice, **other.choice},
                one.resident + other.resident,
                one.stored + other.stored,
                one.loss + other.loss,
            )
            for one in found
            for other in front
        )
    return found


def _fewest_loads(
    by_engine: Mapping[str, list[_Option]], tensors: Mapping[str, int], on: Device
) -> _Option:
    """Return the choice with which an image loads least: some engines stay, the others, with the
    fewest bits, come one after the other; what stays gets the bits that are left.

    Raises:
        RecipeError: an engine does not fit by itself.
    """
    smallest = {name: front[0] for name, front in by_engine.items()}
    alone = {name: option.resident + tensors[name] for name, option in smallest.items()}
    worst = max(alone, key=lambda name: alone[name])
    if alone[worst] > on.memory:
        raise RecipeError(
            f"--fit: {on.title} has {size_text(on.memory)} for engines, and `{worst}` takes "
            f"{size_text(alone[worst], up=True)} by itself with the fewest bits",
            hint=f"the smallest that fits is {size_text(alone[worst], up=True)}",
        )
    loads: dict[tuple[str, ...], int] = {}
    spare: dict[tuple[str, ...], int] = {}
    for count in range(len(smallest)):
        for stay in itertools.combinations(smallest, count):
            comes = [name for name in smallest if name not in stay]
            beside = max(*(alone[name] for name in comes), *(tensors[name] for name in stay), 0)
            spare[stay] = on.memory - beside
            if sum(smallest[name].resident for name in stay) <= spare[stay]:
                loads[stay] = sum(smallest[name].stored for name in comes)
    stay = min(loads, key=lambda names: (loads[names], names))
    kept = [o for o in _together(by_engine[n] for n in stay) if o.resident <= spare[stay]][-1]
    return _together([[kept], *([smallest[name]] for name in smallest if name not in stay)])[0]


def _storage(works: Sequence[Work], choice: Choice, fallback: Format) -> Storage:
    """Return a choice as a recipe says it: of an engine, what most of its layers are; of groups,
    what they are where it differs."""
    stages, patterns = {}, {}
    for work in works:
        found = _layers(work)
        sizes: dict[str, int] = {}
        for group, layers in found.items():
            if not layers[0].exception:
                size = sum(layer.weights for layer in layers)
                sizes[choice[group]] = sizes.get(choice[group], 0) + size
        most = max(sizes, key=lambda name: sizes[name], default=fallback.name)
        if most != fallback.name:
            stages[work.engine] = most
        for group, layers in found.items():
            if choice[group] != (fallback.name if layers[0].exception else most):
                patterns[group] = choice[group]
    return Storage(fallback, fallback, stages, patterns)


def _described(
    works: Sequence[Work], choice: Choice, losses: Losses, fallback: Format
) -> Iterable[Group]:
    for work in works:
        for group, layers in _layers(work).items():
            fmt = FORMATS[choice[group]]
            yield Group(
                name=group,
                fmt=fmt.name,
                stored=sum(bytes_of(layer, fmt) for layer in layers),
                in_16_bit=sum(bytes_of(layer, fallback) for layer in layers),
                loss=losses.groups[group][fmt.name] if fmt.quantized else None,
            )
