"""The machines that can be planned for: those of `devices.toml`, and the one this runs on."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from bifrost_rt import files, memory_plan, serialization
from export.errors import RecipeError
from export.formats import FORMATS

TABLE = Path(__file__).with_name("devices.toml")
HERE = "here"
RATES = tuple(dict.fromkeys(declared.rate for declared in FORMATS.values()))
FIGURES = ("memory_gib", "bandwidth", "watts", *RATES)
CERTAINTY = ("published", "derived", "unconfirmed")
GIB = 1 << 30
# What a Jetson's device tree adds to the name of its module.
KIT = ("engineering", "reference", "developer", "kit", "super")


@dataclass(frozen=True)
class Figure:
    """A number with where it comes from and how sure it is."""

    value: float
    source: str
    certainty: str


@dataclass(frozen=True)
class Device:
    """One machine. A figure that is not known is not there.

    Attributes:
        memory: bytes that engines and their tensors may take.
        figures: by the names of `FIGURES`.
    """

    name: str
    title: str
    memory: int
    figures: dict[str, Figure] = field(default_factory=dict)

    def value(self, name: str) -> float | None:
        """Return a figure's number, or None."""
        return self.figures[name].value if name in self.figures else None

    @property
    def known_rates(self) -> bool:
        """Whether its arithmetic is known at all."""
        return any(rate in self.figures for rate in RATES)


def find(name: str) -> Device:
    """Return a device of the table by its name, or `here`.

    Raises:
        RecipeError: no such device, or the table is damaged.
    """
    if name == HERE:
        free = memory_plan.available()
        if free is None:
            raise RecipeError(
                "this machine does not say how much memory it has available",
                hint="pass --memory-budget SIZE",
            )
        return Device(HERE, "this machine", free)
    devices = read(TABLE)
    if name not in devices:
        raise RecipeError(
            f"unknown device {name!r}{serialization.nearest(name, devices)}",
            hint=f"known: {', '.join([HERE, *devices])}",
        )
    return devices[name]


def of_machine(title: str, memory: int | None = None) -> Device | None:
    """Return the device of the table that a machine's own name means, or None.

    A laptop's card of the same number is another, slower one, and none of the table's.

    Args:
        title: as the driver or a Jetson's device tree gives it, such as "NVIDIA GeForce RTX 4090".
        memory: bytes that it shows, a little less than it has; tells sizes of one name apart.
    """
    words = title.lower().replace("nvidia", "").replace("geforce", "").split()
    if words[:1] == ["jetson"]:
        words = [word for word in words if word not in KIT]
    name = "-".join(words)
    for key, device in read(TABLE).items():
        size = device.figures["memory_gib"].value
        fits = memory is not None and 0.85 * size < memory / GIB <= size
        if key == name or (key == f"{name}-{size:.0f}gb" and fits):
            return device
    return None


def read(path: Path) -> dict[str, Device]:
    """Every device of a table.

    Raises:
        RecipeError: a figure without a source or certainty, or an unknown name.
    """
    found = {}
    for name, entry in tomllib.loads(files.read_text(path)).items():
        title = entry.pop("title", name)
        figures = {key: _figure(f"{path.name}: {name}.{key}", key, v) for key, v in entry.items()}
        if "memory_gib" not in figures:
            raise RecipeError(f"{path.name}: {name} has no memory_gib")
        usable = figures["memory_gib"].value * GIB * (1 - memory_plan.MARGIN)
        found[name] = Device(name, title, int(usable), figures)
    return found


def _figure(where: str, key: str, entry: object) -> Figure:
    if key not in FIGURES:
        raise RecipeError(f"{where}: unknown figure{serialization.nearest(key, FIGURES)}")
    match entry:
        case [int() | float() as value, str() as source, str() as certainty] if (
            value > 0 and source and certainty in CERTAINTY
        ):
            return Figure(float(value), source, certainty)
    raise RecipeError(
        f"{where}: expected [number, source, certainty], found {entry!r}",
        hint=f"certainty is one of {', '.join(CERTAINTY)}",
    )
