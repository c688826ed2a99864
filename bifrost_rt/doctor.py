"""What this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Sequence

from bifrost_rt import backends, cache, generator, manifest, memory_plan, processor
from bifrost_rt.backends import gpu
from bifrost_rt.errors import EngineSetError
from bifrost_rt.processor import Processor

# what to do -> the packages that it takes, and the extra that brings them
TASKS = {
    "serving (bifrost-rt serve)": (("fastapi", "uvicorn", "prometheus_client"), "serve"),
    "serving on many devices (serve run bifrost_rt.serve.ray_app:app)": (("ray",), "ray"),
    "building sets (python -m export.build)": (
        ("torch", "transformers", "diffusers", "onnx", "onnxscript"),
        "export",
    ),
    "compiling sets (python -m export.compile)": (("onnx", "onnx_ir", "ml_dtypes"), "compile"),
    "measuring (bifrost-rt bench)": (("matplotlib", "scipy", "skimage"), "benchmarks"),
}
# modules that two packages bring, onnxruntime and onnxruntime-gpu: the module knows which one it is
TWO_PACKAGES = {"onnxruntime"}
# packages whose distribution has another name
_DISTRIBUTIONS = {
    "skimage": "scikit-image",
    "prometheus_client": "prometheus-client",
    "onnx_ir": "onnx-ir",
    "ml_dtypes": "ml-dtypes",
}


def report(here: Processor | None = None) -> str:
    """Several lines of text. Imports nothing heavy but onnxruntime: it asks what is
    installed.

    Args:
        here: the processor; None takes this machine's.
    """
    lines = [
        f"bifrost-rt {importlib.metadata.version('bifrost-rt')}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores{_memory()}",
        _gpu(),
        "",
        "processor",
        *(f"  {line}" for line in processor.describe(here or processor.here())),
        "",
        "backends",
    ]
    for name, backend in backends.BACKENDS.items():
        reason = backend.unavailable()
        if reason:
            remedy = backend.remedy()
            lines.append(f"  {name:16} no: {reason}" + (f"; {remedy}" if remedy else ""))
        else:
            lines.append(f"  {name:16} yes, version {_version(backend.library)}")
    lines += ["", "the default model's set", f"  {_default_set()}"]
    lines += ["", "what builds and TensorRT-RTX keep, safe to delete", f"  {_cache()}"]
    for title, (packages, extra) in TASKS.items():
        lines += ["", title, f"  {_task(packages, extra)}"]
    return "\n".join(lines)


def _gpu() -> str:
    found = gpu.find()
    return f"no GPU: {found}" if isinstance(found, str) else f"{found.name}, {found.architecture}"


def _default_set() -> str:
    try:
        path = generator.default_set()
        return f"{path}, for {manifest.read(path).backend}"
    except EngineSetError as error:
        return f"no: {error.message}" + (f"; {error.hint}" if error.hint else "")


def _cache() -> str:
    folder = cache.folder()
    size = sum(path.stat().st_size for path in folder.glob("*/*") if path.is_file())
    return f"{folder}, {size / 2**20:.0f} MiB; {cache.VARIABLE} names another folder"


def _task(packages: Sequence[str], extra: str) -> str:
    if extra == "benchmarks" and importlib.util.find_spec("benchmarks") is None:
        return "no: only in a checkout of the source; pip install -e '.[export,benchmarks]' there"
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        return f"no: {', '.join(missing)} not installed; pip install 'bifrost-rt[{extra}]'"
    return "yes: " + ", ".join(f"{name} {_version(name)}" for name in packages)


def _version(library: str) -> str:
    if library in TWO_PACKAGES:
        return str(importlib.import_module(library).__version__)
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(library, library))
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(importlib.import_module(library), "__version__", "unknown"))


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return ""
    free = memory_plan.host_memory()
    return f", {size / 2**30:.0f} GiB of memory" + (
        "" if free is None else f" ({free / 2**30:.0f} free)"
    )
