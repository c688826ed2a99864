"""The most memory that this process has held. Python alone: processes of peers read it, too."""

from __future__ import annotations

import resource
from pathlib import Path


def peak_bytes() -> int:
    """Return bytes of physical memory, at most, since the process began."""
    path = Path("/proc/self/status")  # the peak of getrusage is the parent's across a fork
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
