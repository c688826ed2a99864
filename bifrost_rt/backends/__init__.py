"""Backends by name. A backend's library is imported when the backend is asked for, not before."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

from bifrost_rt.backends import gpu
from bifrost_rt.backends.base import Backend
from bifrost_rt.backends.mixed import Mixed
from bifrost_rt.errors import BackendError
from bifrost_rt.serialization import nearest


@dataclass(frozen=True)
class BackendInfo:
    """Where a backend lives, what it needs, and how a user gets that.

    Attributes:
        library: the package that computes, and `also` what it needs beside that.
        gpu: whether it computes on an NVIDIA GPU.
        compiled: whether it runs engines of `python -m export.compile`, not ONNX graphs.
        provider: what the installed onnxruntime must have been built with.
        exact: whether it computes in the precision that the set states. Others trade some for
            speed, and run only when they are asked for by name.
    """

    target: str
    library: str
    extra: str
    also: tuple[str, ...] = ()
    gpu: bool = False
    compiled: bool = False
    provider: str | None = None
    exact: bool = True

    def unavailable(self) -> str | None:
        """Return the reason why this backend cannot run here, or None."""
        if self.gpu:
            found = gpu.find()
            if isinstance(found, str):
                return found  # first: no package would help
        if missing := self.missing():
            return f"the Python package `{missing}` is not installed"
        if self.provider is not None:
            there = importlib.import_module(self.library).get_available_providers()
            if self.provider not in there:
                return f"the installed {self.library} was built without {self.provider}"
        return None

    def missing(self) -> str | None:
        """Return the first package that it needs and that is not installed."""
        return next((name for name in (self.library, *self.also) if not installed(name)), None)

    def remedy(self) -> str | None:
        """Return what to do where it is not available; None where this machine can never run it."""
        if self.gpu and isinstance(gpu.find(), str):
            return None
        install = f"pip install 'bifrost-rt[{self.extra}]'"
        if self.provider is not None and self.missing() is None:
            return f"pip uninstall {self.library}, then {install}"  # one module of two packages
        return install


def installed(name: str) -> bool:
    """Say whether a Python module is there, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that a dotted name is in
        return False


BACKENDS = {
    "onnxruntime": BackendInfo("bifrost_rt.backends.onnxruntime:OnnxRuntime", "onnxruntime", "cpu"),
    "openvino": BackendInfo("bifrost_rt.backends.openvino:OpenVino", "openvino", "openvino"),
    "openvino-bf16": BackendInfo(
        "bifrost_rt.backends.openvino:OpenVinoBf16", "openvino", "openvino", exact=False
    ),
    "onnxruntime-cuda": BackendInfo(
        "bifrost_rt.backends.onnxruntime_cuda:OnnxRuntimeCuda",
        "onnxruntime",
        "cuda",
        gpu=True,
        provider="CUDAExecutionProvider",
    ),
    "tensorrt-rtx": BackendInfo(
        "bifrost_rt.backends.tensorrt:TensorRtRtx",
        "tensorrt_rtx",
        "tensorrt-rtx",
        also=("cuda.bindings",),
        gpu=True,
        compiled=True,
    ),
    "tensorrt": BackendInfo(
        "bifrost_rt.backends.tensorrt:TensorRt",
        "tensorrt",
        "tensorrt",
        also=("cuda.bindings",),
        gpu=True,
        compiled=True,
    ),
}


def parse(text: str) -> tuple[str | None, dict[str, str]]:
    """Read `NAME`, `ENGINE=NAME` or several with commas: the set's backend and those of engines.

    Raises:
        BackendError: two for the set, or a part without a name.
    """
    main, own = None, {}
    for part in (part.strip() for part in text.split(",")):
        engine, given, name = part.rpartition("=")
        if given and engine and name:
            own[engine.strip()] = name.strip()
        elif given or not part or main is not None:
            raise BackendError(
                f"backend {text!r}: cannot read {part!r}",
                hint="give one name, and where engines have their own `ENGINE=NAME` behind commas",
            )
        else:
            main = part
    return main, own


def beside(main: Backend, own: Mapping[str, str]) -> Backend:
    """Start the backends of engines that have their own beside that of the set.

    Args:
        own: engine -> its backend's name.

    Raises:
        BackendError: as in `load`.
    """
    others = dict.fromkeys(name for name in own.values() if name != main.name)
    started = {name: load(name) for name in others}
    elsewhere = {engine: started[name] for engine, name in own.items() if name in started}
    return Mixed(main, elsewhere) if elsewhere else main


def load(name: str) -> Backend:
    """Start the info called `name`.

    Raises:
        BackendError: an unknown name, or the reason why it is not available here.
    """
    if name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r}{nearest(name, BACKENDS)}; this version has "
            + ", ".join(BACKENDS)
        )
    info = BACKENDS[name]
    if reason := info.unavailable():
        raise BackendError(f"backend {name!r} is not available: {reason}", hint=info.remedy())
    module, _, attribute = info.target.partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend
