"""Number formats, one file each, of the same names as in `bifrost_rt.formats`."""

from __future__ import annotations

import importlib
import pkgutil

from bifrost_rt import formats as runtime
from export.formats.base import Format


def _declared() -> list[Format]:
    names = (module.name for module in pkgutil.iter_modules(__path__))
    modules = (importlib.import_module(f"{__name__}.{name}") for name in names)
    found = (module.FORMAT for module in modules if hasattr(module, "FORMAT"))
    return sorted(found, key=lambda declared: declared.runtime.order)


FORMATS: dict[str, Format] = {declared.name: declared for declared in _declared()}
FULL, HALF = FORMATS[runtime.FULL.name], FORMATS[runtime.HALF.name]
SIXTEEN_BIT = tuple(FORMATS[declared.name] for declared in runtime.SIXTEEN_BIT)
# 16 bit that all GPUs have
OLDEST_HALF = min(SIXTEEN_BIT, key=lambda declared: declared.since)


def of_type(dtype: str) -> Format | None:
    """Return the format whose weights are stored in a dtype, or whose products are computed in
    it."""
    found = runtime.of_type(dtype)
    return None if found is None else FORMATS.get(found.name)


def rate_of(dtype: str) -> str | None:
    """Return a device's figure for products of a dtype; None where a dtype has no products."""
    found = (f.rate for f in FORMATS.values() if f.runtime.computes_in == dtype)
    return next(found, None)


def by_age() -> list[Format]:
    """Return the oldest GPUs' first, and behind all others those that are quantized."""
    return sorted(FORMATS.values(), key=lambda declared: (declared.quantized, declared.since))


def eight_bit() -> list[Format]:
    """Return the quantized formats of one byte per weight."""
    return [f for f in FORMATS.values() if f.quantized and f.linear_bits == 8]
