"""What an NVIDIA GPU tells: through NVML (`pip install nvidia-ml-py`), else through `nvidia-smi`.

Both come with the driver; the package is only NVML's Python side. On a Jetson before Thor neither
exists, and `tegrastats` tells (benchmarks/jetson.py).
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from typing import Any

from benchmarks.sensors import INTERVAL, Lines, Reading, Source, output
from bifrost_rt.backends import gpu

# nvmlClocksEventReason*, as `clocks_event_reasons.active` prints them too. An idle GPU is no limit.
LIMITS = {
    0x02: "application_clocks",
    0x04: "power_cap",
    0x08: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "software_thermal_slowdown",
    0x40: "hardware_thermal_slowdown",
    0x80: "power_brake",
    0x100: "display_clocks",
}
STATIC = (
    *("name", "driver_version", "memory.total", "power.limit"),
    *("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
)
LIVE = {
    "power.draw": "gpu_w",
    "clocks.sm": "gpu_sm_mhz",
    "clocks.mem": "gpu_memory_mhz",
    "temperature.gpu": "gpu_c",
}
# drivers before 535 know the second name alone
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
MIB = 1 << 20


def limits(mask: int) -> frozenset[str]:
    """Return what a mask of clock event reasons names."""
    return frozenset(name for bit, name in LIMITS.items() if mask & bit)


def parse_live(line: str) -> Reading | None:
    """Return a line of `nvidia-smi --query-gpu=LIVE,reasons --format=csv,noheader,nounits`. A field
    that the card does not have reads `[N/A]`."""
    *values, reasons = (part.strip() for part in line.split(","))
    if len(values) != len(LIVE):
        return None
    gauges = {}
    for name, value in zip(LIVE.values(), values, strict=True):
        try:
            gauges[name] = float(value)
        except ValueError:
            continue
    mask = int(reasons, 16) if reasons.startswith("0x") else 0
    return Reading(gauges, limits(mask)) if gauges else None


def parse_process(line: str) -> tuple[int, int] | None:
    """Return a line of `nvidia-smi --query-compute-apps=pid,used_memory
    --format=csv,noheader,nounits`: process id and bytes."""
    pid, _, size = (part.strip() for part in line.partition(","))
    return (int(pid), int(size) * MIB) if pid.isdecimal() and size.isdecimal() else None


def parse_static(line: str) -> dict[str, str]:
    """Return a line of `nvidia-smi --query-gpu=STATIC --format=csv,noheader`."""
    pairs = zip(STATIC, (part.strip() for part in line.split(",")), strict=False)
    return {name: value for name, value in pairs if not value.startswith("[")}


class Smi:
    """Two `nvidia-smi` that keep printing: the card's figures, and who holds how much of it.

    Args:
        bus: PCI address of the card.
    """

    def __init__(self, program: str, bus: str, reasons: str) -> None:
        every = ["--format=csv,noheader,nounits", "-i", bus, "-lms", str(round(1000 * INTERVAL))]
        self._held: dict[int, int] = {}
        query = f"--query-gpu={','.join((*LIVE, reasons))}"
        self._card = Lines([program, query, *every], parse_live)
        query = "--query-compute-apps=pid,used_memory"
        self._processes = Lines([program, query, *every], self._note)

    def _note(self, line: str) -> None:
        if (found := parse_process(line)) is not None:
            pid, size = found
            self._held[pid] = max(self._held.get(pid, 0), size)

    def read(self) -> Reading | None:
        """Return the card's last line, once."""
        return self._card.read()

    def counters(self) -> dict[str, float]:
        """Return nothing: it prints no energy."""
        return {}

    def memory(self, pid: int) -> int | None:
        """Return the most that was printed."""
        return self._held.get(pid)

    def close(self) -> None:
        """End both."""
        self._card.close()
        self._processes.close()


class Nvml:
    """The management library.

    Args:
        library: the module `pynvml`, initialised; closing this object shuts it down.
        bus: PCI address of the card.
    """

    def __init__(self, library: Any, bus: str) -> None:
        self._nvml = library
        self._card = library.nvmlDeviceGetHandleByPciBusId(bus)
        self._held: dict[int, int] = {}

    def _told(self, function: str, *arguments: Any) -> Any:
        """Return an answer, or None where this card, driver or version has none."""
        try:
            return getattr(self._nvml, function)(self._card, *arguments)
        except (self._nvml.NVMLError, AttributeError):
            return None

    def read(self) -> Reading | None:
        """Now."""
        nvml = self._nvml
        milliwatts = self._told("nvmlDeviceGetPowerUsage")
        told = {
            "gpu_w": None if milliwatts is None else milliwatts / 1000,
            "gpu_sm_mhz": self._told("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "gpu_memory_mhz": self._told("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "gpu_c": self._told("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        }
        mask = self._told("nvmlDeviceGetCurrentClocksEventReasons")
        if mask is None:  # its name before driver 535
            mask = self._told("nvmlDeviceGetCurrentClocksThrottleReasons")
        for process in self._told("nvmlDeviceGetComputeRunningProcesses") or ():
            size = process.usedGpuMemory or 0  # None: this system does not tell
            self._held[process.pid] = max(self._held.get(process.pid, 0), size)
        gauges = {name: float(value) for name, value in told.items() if value is not None}
        return Reading(gauges, limits(mask or 0)) if gauges else None

    def counters(self) -> dict[str, float]:
        """Joules since the driver was loaded."""
        millijoules = self._told("nvmlDeviceGetTotalEnergyConsumption")
        return {} if millijoules is None else {"gpu_j": millijoules / 1000}

    def memory(self, pid: int) -> int | None:
        """Return the most that was seen."""
        return self._held.get(pid) or None

    def close(self) -> None:
        """Shut it down."""
        self._nvml.nvmlShutdown()


def bus_id(load: Callable[[str], Any] = ctypes.CDLL) -> str | None:
    """PCI address of the GPU that engines run on, which is not always the first in NVML's order;
    None without a GPU.

    Args:
        load: opens a shared library; a test passes its own.
    """
    if isinstance(gpu.find(load), str):
        return None
    driver, device = load(gpu.LIBRARY), ctypes.c_int()
    text = ctypes.create_string_buffer(32)
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceGetPCIBusId(text, 32, device):
        return None
    return text.value.decode()


def sources() -> list[Source]:
    """Return the GPU, where there is one that tells."""
    bus = bus_id()
    if bus is None:
        return []
    if (told := _nvml(bus)) is not None:
        return [told]
    program = shutil.which("nvidia-smi")
    for reasons in REASONS if program else ():
        if output("nvidia-smi", f"--query-gpu={reasons}", "--format=csv,noheader", "-i", bus):
            return [Smi(str(program), bus, reasons)]
    return []


def describe() -> dict[str, str]:
    """Name, driver, memory, power limit and clocks; empty without a GPU."""
    query = [f"--query-gpu={','.join(STATIC)}", "--format=csv,noheader"]
    if (bus := bus_id()) is None or (line := output("nvidia-smi", *query, "-i", bus)) is None:
        here = gpu.find()
        return {} if isinstance(here, str) else {"name": here.name}
    return parse_static(line)


def _nvml(bus: str) -> Nvml | None:
    """NVML, where its package is installed and it knows the card; a Jetson's it may not."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
        found = Nvml(pynvml, bus)
    except pynvml.NVMLError:
        return None
    return found if found.read() or found.counters() else None
