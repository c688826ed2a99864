"""What Linux tells of the processor: temperature, frequency, throttling, energy. Root may have to
allow the last (`chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj`)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from benchmarks.sensors import Reading

SYS = Path("/sys")
# Sensors of the processor that are no thermal zones.
CHIPS = ("coretemp", "k10temp", "zenpower")


def temperature(sys: Path = SYS) -> float | None:
    """Return the hottest thermal zone or sensor of the processor, in degrees Celsius."""
    places = list(sys.glob("class/thermal/thermal_zone*/temp"))
    for chip in sys.glob("class/hwmon/hwmon*"):
        if _text(chip / "name") in CHIPS:
            places += chip.glob("temp*_input")
    return max((degrees / 1000 for degrees in _numbers(places)), default=None)


def frequency_rules(sys: Path = SYS) -> dict[str, str]:
    """Return the highest frequency and who sets it, where the kernel does."""
    folder = sys / "devices/system/cpu/cpufreq/policy0"
    kilohertz = _number(folder / "cpuinfo_max_freq")
    found = {
        "mhz_max": "" if kilohertz is None else str(kilohertz // 1000),
        "governor": _text(folder / "scaling_governor"),
    }
    return {name: text for name, text in found.items() if text}


class Processor:
    """The processor's own account.

    Args:
        sys: where Linux shows its devices.
    """

    def __init__(self, sys: Path = SYS) -> None:
        self._sys = sys
        self._frequencies = sorted(sys.glob("devices/system/cpu/cpufreq/policy*/scaling_cur_freq"))
        throttled = sys.glob("devices/system/cpu/cpu*/thermal_throttle/*_throttle_count")
        self._throttled = sorted(throttled)
        # one colon: packages, and not their parts
        zones = sorted(sys.glob("class/powercap/intel-rapl:*"))
        self._energy = {
            name: Energy(zone)
            for zone in zones
            if zone.name.count(":") == 1
            and (name := _text(zone / "name")).startswith("package")
            and _number(zone / "energy_uj") is not None
        }

    def read(self) -> Reading | None:
        """Return the hottest sensor, and the mean of the frequencies."""
        gauges = {}
        if (degrees := temperature(self._sys)) is not None:
            gauges["hottest_c"] = degrees
        if frequencies := list(_numbers(self._frequencies)):
            gauges["cpu_mhz"] = sum(frequencies) / len(frequencies) / 1000
        return Reading(gauges) if gauges else None

    def counters(self) -> dict[str, float]:
        """Joules of each package, and how often heat held the processor back."""
        found = {f"{name}_j": energy.joules() for name, energy in self._energy.items()}
        for part, total in (("core", sum), ("package", max)):  # each core counts its package's
            counts = [p for p in self._throttled if p.name.startswith(part)]
            if counts:
                found[f"cpu_{part}_throttle_events"] = float(total(_numbers(counts)))
        return found

    def memory(self, pid: int) -> int | None:
        """Return the host's is the process's own."""
        return None

    def close(self) -> None:
        """Nothing is open."""


class Energy:
    """A RAPL counter, which starts again at 0 when it is full."""

    def __init__(self, zone: Path) -> None:
        self._path = zone / "energy_uj"
        self._range = _number(zone / "max_energy_range_uj") or 0
        self._last = _number(self._path) or 0
        self._total = 0

    def joules(self) -> float:
        """Since this object was made."""
        now = _number(self._path)
        if now is not None:
            self._total += now - self._last + (self._range if now < self._last else 0)
            self._last = now
        return self._total / 1e6


def sources() -> list[Processor]:
    """Return the processor, where it tells anything."""
    found = Processor()
    return [found] if found.read() or found.counters() else []


def _numbers(paths: Iterable[Path]) -> Iterable[int]:
    return (number for path in paths if (number := _number(path)) is not None)


def _number(path: Path) -> int | None:
    try:
        return int(_text(path))
    except ValueError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # absent, not ours to read, or a sensor that is switched off
        return ""
