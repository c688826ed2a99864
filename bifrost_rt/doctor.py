"""What this machine can run, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform

from bifrost_rt import backends

BUILD_TOOLS = ("torch", "transformers", "diffusers", "onnx", "onnxscript")


def report() -> str:
    """Several lines of text. Imports nothing heavy: it asks what is installed."""
    lines = [
        f"bifrost-rt {importlib.metadata.version('bifrost-rt')}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores{_memory()}",
        "",
        "backends",
    ]
    for name, driver in backends.DRIVERS.items():
        reason = driver.unavailable()
        if reason:
            remedy = driver.remedy()
            lines.append(f"  {name:12} no: {reason}" + (f"; {remedy}" if remedy else ""))
        else:
            lines.append(f"  {name:12} yes, version {_version(driver.library)}")
    missing = [name for name in BUILD_TOOLS if importlib.util.find_spec(name) is None]
    lines += ["", "building sets (python -m export.build)"]
    if missing:
        lines.append(f"  no: {', '.join(missing)} not installed; pip install 'bifrost-rt[export]'")
    else:
        lines.append("  yes: " + ", ".join(f"{name} {_version(name)}" for name in BUILD_TOOLS))
    return "\n".join(lines)


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # onnxruntime-gpu installs `onnxruntime`
        return str(getattr(importlib.import_module(library), "__version__", "unknown"))


def _memory() -> str:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return ""
    return f", {size / 2**30:.0f} GiB of memory"
