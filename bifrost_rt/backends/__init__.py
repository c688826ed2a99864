"""Drivers by name. A driver's library is imported when the driver is asked for, not before."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass

from bifrost_rt.backends.base import Backend
from bifrost_rt.errors import BackendError
from bifrost_rt.strict import nearest


@dataclass(frozen=True)
class Driver:
    """Where a backend lives, what it needs, and how a user gets that."""

    target: str
    library: str
    extra: str

    def unavailable(self) -> str | None:
        """The reason why this driver cannot run here, or None."""
        if importlib.util.find_spec(self.library) is None:
            return f"the Python package `{self.library}` is not installed"
        return None


DRIVERS = {
    "onnxruntime": Driver("bifrost_rt.backends.onnxruntime:OnnxRuntime", "onnxruntime", "cpu"),
    "openvino": Driver("bifrost_rt.backends.openvino:OpenVino", "openvino", "openvino"),
}


def load(name: str) -> Backend:
    """Start the driver called `name`.

    Raises:
        BackendError: an unknown name, or the reason why it is not available here.
    """
    if name not in DRIVERS:
        raise BackendError(
            f"unknown backend {name!r}{nearest(name, DRIVERS)}; this version has "
            + ", ".join(DRIVERS)
        )
    driver = DRIVERS[name]
    if reason := driver.unavailable():
        raise BackendError(
            f"backend {name!r} is not available: {reason}",
            hint=f"pip install 'bifrost-rt[{driver.extra}]'",
        )
    module, _, attribute = driver.target.partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
