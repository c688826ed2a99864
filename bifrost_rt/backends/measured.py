"""What `bifrost-rt tune` has measured on this machine: seconds of an image by backend, per set.

Kept in the cache folder, for this set on this processor with these versions of the libraries; where
one of them is another, nothing is known.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping

from bifrost_rt import cache
from bifrost_rt import processor as processors
from bifrost_rt.manifest import Manifest

KIND = "tuning"  # subfolder of the cache
LIBRARIES = ("onnxruntime", "openvino")


def recall(manifest: Manifest) -> dict[str, float] | None:
    """Return the seconds of each backend that was measured; None where none was, or where this
    process was told to run without what earlier ones kept."""
    if cache.off() or not (cache.folder() / KIND).is_dir():  # most users never tune
        return None
    if (stored := cache.read(KIND, _key(manifest))) is None:
        return None
    seconds: dict[str, float] = json.loads(stored)
    return seconds


def keep(manifest: Manifest, seconds: Mapping[str, float]) -> str | None:
    """Keep what was measured. Returns why it could not be kept, or None."""
    return cache.write(KIND, _key(manifest), json.dumps(dict(seconds)).encode())


def _key(manifest: Manifest) -> str:
    here = processors.here()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = [
        hashlib.sha256(manifest.dumps()).hexdigest(),
        *(here.machine, here.name, here.limit, sorted(here.features), cores),
        [_version(library) for library in LIBRARIES],
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""
