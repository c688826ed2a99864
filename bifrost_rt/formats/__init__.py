"""Number formats, one file each. Others ask a format what it is; none knows it by its name.

A name that a newer build wrote into a set and that has no file here changes nothing: layers of it
run as their graph says.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from bifrost_rt.formats.base import Format


def _declared() -> list[Format]:
    names = (module.name for module in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    found = (module.FORMAT for module in modules if hasattr(module, "FORMAT"))
    return sorted(found, key=lambda declared: declared.order)


FORMATS: dict[str, Format] = {declared.name: declared for declared in _declared()}
# What every input and output is, and what all others are compared with.
FULL = max(FORMATS.values(), key=lambda declared: declared.weight_bits)
# The first is what 16 bit means where nobody names one: it has the range of `FULL`.
SIXTEEN_BIT = tuple(f for f in FORMATS.values() if not f.quantized and f.weight_bits == 16)
HALF = SIXTEEN_BIT[0]


def of_layers(names: Iterable[str]) -> list[Format]:
    """Return the formats with these names, in the order of `FORMATS`."""
    wanted = set(names)
    return [declared for name, declared in FORMATS.items() if name in wanted]


def of_type(dtype: str) -> Format | None:
    """Return the format whose weights are stored in a dtype, or whose products are computed in
    it."""
    both = ((dtype == f.dtype or dtype == f.computes_in, f) for f in FORMATS.values())
    return next((declared for fits, declared in both if fits), None)


def simulated(names: Iterable[str]) -> list[str]:
    """Return the names of those that a CPU simulates, in alphabetical order."""
    return sorted(declared.name for declared in of_layers(names) if declared.simulated)


def multiplying_bytes(names: Iterable[str]) -> str:
    """Return the names of those whose layers a CPU computes as products of bytes, as one phrase;
    empty where there are none."""
    return " and ".join(f.name for f in of_layers(names) if f.multiplies_bytes)


def in_memory(dtype: str, backend: str, other: float) -> float:
    """Return bytes in a backend's memory over bytes stored, for weights of a dtype.

    Args:
        other: where nothing was measured for it.
    """
    declared = of_type(dtype)
    return other if declared is None else declared.in_memory.get(backend, other)
