"""What a Jetson tells: its model, and `tegrastats`, a line of text per reading.

Source of the format: NVIDIA Jetson Linux Developer Guide, Tegrastats Utility. Rails differ from
module to module and are kept under their names: `VDD_IN` (Orin Nano, Orin NX, Xavier NX), `VIN`
(Thor) and `POM_5V_IN` (Nano) are the whole module or board; AGX Orin has parts alone.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from benchmarks.sensors import INTERVAL, Lines, Reading, output

MODEL = Path("/proc/device-tree/model")
RELEASE = Path("/etc/nv_tegra_release")
# now/average in mW; Jetson Nano writes no unit
_RAIL = re.compile(r"\b(?!NC\b)([A-Z][A-Z0-9_]+) (-?\d+)(?:mW)?/-?\d+(?:mW)?(?= |$)")
_RAM = re.compile(r"\bRAM (\d+)/\d+MB")
_TEMPERATURE = re.compile(r"\b([A-Za-z]\w*)@(-?[\d.]+)C\b")
_GPU = re.compile(r"\bGR3D_FREQ (?:(\d+)%)?(?:@\[?([\d,]+)\]?)?")
OFF = -256.0  # a sensor whose part is switched off


def parse(line: str) -> Reading | None:
    """One line of tegrastats."""
    gauges = {f"{rail}_w": int(power) / 1000 for rail, power in _RAIL.findall(line)}
    if ram := _RAM.search(line):
        gauges["ram_bytes"] = float(int(ram[1]) << 20)
    for name, text in _TEMPERATURE.findall(line):
        if (degrees := float(text)) > OFF:
            gauges[f"{name.lower()}_c"] = degrees
    if gpu := _GPU.search(line):
        if gpu[1]:
            gauges["gpu_percent"] = float(gpu[1])
        if gpu[2]:
            gauges["gpu_mhz"] = max(float(part) for part in gpu[2].split(","))
    return Reading(gauges) if gauges else None


def describe() -> dict[str, str]:
    """Model, Jetson Linux release and power mode, where this is a Jetson."""
    found = {
        "model": MODEL.read_text().rstrip("\0").strip() if MODEL.exists() else "",
        "jetson_linux": RELEASE.read_text().splitlines()[0].strip("# ") if RELEASE.exists() else "",
        "power_mode": output("nvpmodel", "-q") or "",
    }
    return {name: text for name, text in found.items() if text}


def sources() -> list[Lines]:
    """tegrastats, where there is one."""
    if (program := shutil.which("tegrastats")) is None:
        return []
    return [Lines([program, "--interval", str(round(1000 * INTERVAL))], parse)]
