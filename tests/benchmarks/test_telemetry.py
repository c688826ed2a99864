"""What the machine tells: lines as devices print them, files as Linux lays them out, and what
becomes of them in a record."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import host, jetson, nvidia
from benchmarks.sensors import Lines, Reading
from benchmarks.telemetry import Log, Telemetry
from tests.patience import until

ORIN_NANO = (
    "10-08-2026 04:35:02 RAM 6712/7620MB (lfb 12x4MB) SWAP 369/3810MB (cached 8MB) "
    "CPU [38%@1497,2%@729,off,0%@729] EMC_FREQ 61%@2133 GR3D_FREQ 99%@[612] NVDEC off VIC off "
    "APE 200 cpu@57.125C soc2@55.093C gpu@58.625C tj@58.312C "
    "VDD_IN 16321mW/11204mW VDD_CPU_GPU_CV 7104mW/4944mW VDD_SOC 3120mW/2900mW"
)
AGX_ORIN = (
    "04-11-2025 10:36:27 RAM 4321/62801MB (lfb 1759x4MB) SWAP 19/31400MB (cached 0MB) "
    "CPU [0%@729,0%@729] EMC_FREQ 0%@2133 GR3D_FREQ 0%@[305,0] VIC_FREQ 729 APE 174 CV0@-256C "
    "CPU@44.562C Tboard@32C GPU@-256C tj@44.343C VDD_GPU_SOC 2340mW/2340mW "
    "VDD_CPU_CV -398mW/-398mW VIN_SYS_5V0 4025mW/4025mW NC 0mW/0mW VDDQ_VDD2_1V8AO 301mW/301mW "
    "NC 0mW/0mW"
)
THOR = (
    "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,8%@972] EMC_FREQ 0%@2750 "
    "GR3D_FREQ @[314,315,314] NVENC0_FREQ @314 VIC off PVA0_FREQ off APE 300 cpu@37.343C "
    "gpu@38.875C VDD_GPU 1962mW/1962mW VDD_CPU_SOC_MSS 5887mW/5887mW VIN_SYS_5V0 5635mW/5635mW "
    "VIN 19780mW/19780mW"
)
NANO = (
    "RAM 1923/3964MB (lfb 2x2MB) SWAP 191/1982MB (cached 6MB) IRAM 0/252kB(lfb 252kB) "
    "CPU [5%@1224,4%@1224] EMC_FREQ 0%@1600 GR3D_FREQ 7%@76 APE 25 PLL@37C CPU@40C PMIC@50C "
    "GPU@40C POM_5V_IN 1750/1628 POM_5V_GPU 0/0 POM_5V_CPU 366/406"
)


def power(line: str) -> dict[str, float]:
    reading = jetson.parse(line)
    assert reading is not None
    return {name: value for name, value in reading.gauges.items() if name.endswith("_w")}


def test_tegrastats_of_four_jetsons() -> None:
    nano = jetson.parse(ORIN_NANO)
    assert nano is not None
    assert nano.gauges == {
        **{"VDD_IN_w": 16.321, "VDD_CPU_GPU_CV_w": 7.104, "VDD_SOC_w": 3.12},
        **{"ram_bytes": 6712 * 2**20, "gpu_percent": 99, "gpu_mhz": 612},
        **{"cpu_c": 57.125, "soc2_c": 55.093, "gpu_c": 58.625, "tj_c": 58.312},
    }
    assert power(AGX_ORIN) == {
        **{"VDD_GPU_SOC_w": 2.34, "VDD_CPU_CV_w": -0.398, "VIN_SYS_5V0_w": 4.025},
        "VDDQ_VDD2_1V8AO_w": 0.301,
    }
    orin = jetson.parse(AGX_ORIN)
    assert orin is not None
    assert "gpu_c" not in orin.gauges  # switched off, not at -256 °C
    assert orin.gauges["gpu_mhz"] == 305
    assert power(THOR)["VIN_w"] == 19.78
    assert power(NANO) == {"POM_5V_IN_w": 1.75, "POM_5V_GPU_w": 0.0, "POM_5V_CPU_w": 0.366}
    assert jetson.parse("") is None


def test_a_line_of_nvidia_smi() -> None:
    reading = nvidia.parse_live("321.45, 2520, 10501, 71, 0x0000000000000004\n")
    gauges = {"gpu_w": 321.45, "gpu_sm_mhz": 2520, "gpu_memory_mhz": 10501, "gpu_c": 71}
    assert reading == Reading(gauges, frozenset({"power_cap"}))
    idle = nvidia.parse_live("[N/A], 210, 405, 33, 0x0000000000000001")
    assert idle == Reading({"gpu_sm_mhz": 210, "gpu_memory_mhz": 405, "gpu_c": 33})
    assert nvidia.parse_live("No devices were found") is None
    assert nvidia.limits(0x60) == {"software_thermal_slowdown", "hardware_thermal_slowdown"}


def test_other_lines_of_nvidia_smi() -> None:
    assert nvidia.parse_process("12345, 4321") == (12345, 4321 * 2**20)
    assert nvidia.parse_process("12345, [N/A]") is None
    assert nvidia.parse_process("") is None
    line = "NVIDIA GeForce RTX 4090, 570.86.15, 24564 MiB, 450.00 W, 210 MHz, 405 MHz, [N/A], [N/A]"
    assert nvidia.parse_static(line) == {
        **{"name": "NVIDIA GeForce RTX 4090", "driver_version": "570.86.15"},
        **{"memory.total": "24564 MiB", "power.limit": "450.00 W"},
        **{"clocks.sm": "210 MHz", "clocks.mem": "405 MHz"},
    }


class NVMLDoubleError(Exception):
    pass


class Card:
    """A card behind NVML's names, of which some drivers lack the newer ones."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError = NVMLDoubleError

    def __init__(self) -> None:
        self.energy, self.held = 5000, 100

    def nvmlDeviceGetHandleByPciBusId(self, bus: str) -> str:
        assert bus == "0000:01:00.0"
        return "card"

    def nvmlDeviceGetPowerUsage(self, card: str) -> int:
        return 250_500

    def nvmlDeviceGetClockInfo(self, card: str, kind: int) -> int:
        return {1: 2500, 2: 10000}[kind]

    def nvmlDeviceGetTemperature(self, card: str, sensor: int) -> int:
        raise NVMLDoubleError("not supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card: str) -> int:
        return 0x41

    def nvmlDeviceGetTotalEnergyConsumption(self, card: str) -> int:
        return self.energy

    def nvmlDeviceGetComputeRunningProcesses(self, card: str) -> list[Any]:
        return [
            SimpleNamespace(pid=7, usedGpuMemory=self.held),
            SimpleNamespace(pid=8, usedGpuMemory=None),
        ]

    def nvmlShutdown(self) -> None:
        pass


def test_nvml_tells_what_the_card_has() -> None:
    card = Card()
    source = nvidia.Nvml(card, "0000:01:00.0")
    reading = source.read()
    gauges = {"gpu_w": 250.5, "gpu_sm_mhz": 2500, "gpu_memory_mhz": 10000}
    assert reading == Reading(gauges, frozenset({"hardware_thermal_slowdown"}))
    assert source.counters() == {"gpu_j": 5.0}
    card.held = 60
    source.read()
    assert source.memory(7) == 100  # the most, not the last
    assert source.memory(8) is None
    assert source.memory(9) is None


def test_nvml_has_these_names() -> None:
    library = pytest.importorskip("pynvml")
    names = {name for name in vars(Card) if name.lower().startswith("nvml")}
    for name in {*names, "nvmlInit", "nvmlDeviceGetCurrentClocksEventReasons"}:
        assert hasattr(library, name), name
    for bit in nvidia.LIMITS:
        assert bit & library.nvmlClocksEventReasonAll


def test_the_card_is_found_by_its_address() -> None:
    class Driver:
        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: 0

        def cuDeviceGetPCIBusId(self, text: Any, size: int, device: Any) -> int:
            text.value = b"0000:01:00.0"
            return 0

    def missing(name: str) -> Any:
        raise OSError

    assert nvidia.bus_id(lambda name: Driver()) == "0000:01:00.0"
    assert nvidia.bus_id(missing) is None


def lay(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


RAPL = "class/powercap/intel-rapl:0"
CPU = "devices/system/cpu"


def test_the_processor_tells_what_linux_shows(tmp_path: Path) -> None:
    lay(
        tmp_path,
        {
            "class/thermal/thermal_zone0/temp": "41000",
            "class/hwmon/hwmon0/name": "k10temp",
            "class/hwmon/hwmon0/temp1_input": "55500",
            "class/hwmon/hwmon1/name": "nvme",
            "class/hwmon/hwmon1/temp1_input": "80000",
            f"{CPU}/cpufreq/policy0/scaling_cur_freq": "3000000",
            f"{CPU}/cpufreq/policy0/cpuinfo_max_freq": "4200000",
            f"{CPU}/cpufreq/policy0/scaling_governor": "powersave",
            f"{CPU}/cpufreq/policy1/scaling_cur_freq": "2000000",
            **{f"{CPU}/cpu{i}/thermal_throttle/core_throttle_count": "2" for i in (0, 1)},
            **{f"{CPU}/cpu{i}/thermal_throttle/package_throttle_count": "3" for i in (0, 1)},
            f"{RAPL}/name": "package-0",
            f"{RAPL}/energy_uj": "900000",
            f"{RAPL}/max_energy_range_uj": "1000000",
            f"{RAPL}:0/name": "core",
            f"{RAPL}:0/energy_uj": "1",
            "class/powercap/intel-rapl-mmio:0/name": "package-0",
            "class/powercap/intel-rapl-mmio:0/energy_uj": "1",
        },
    )
    processor = host.Processor(tmp_path)
    assert processor.read() == Reading({"hottest_c": 55.5, "cpu_mhz": 2500})
    throttled = {"cpu_core_throttle_events": 4, "cpu_package_throttle_events": 3}
    assert processor.counters() == {"package-0_j": 0.0, **throttled}
    lay(tmp_path, {f"{RAPL}/energy_uj": "100000"})  # it was full and began again
    assert processor.counters()["package-0_j"] == pytest.approx(0.2)
    assert host.frequency_rules(tmp_path) == {"mhz_max": "4200", "governor": "powersave"}


def test_a_processor_that_tells_nothing(tmp_path: Path) -> None:
    assert host.Processor(tmp_path).read() is None
    assert host.Processor(tmp_path).counters() == {}
    assert host.temperature(tmp_path) is None
    assert host.frequency_rules(tmp_path) == {}


class Meters:
    """A source whose power is given and whose energy grows by ten joules a question."""

    def __init__(self, watts: float) -> None:
        self.watts, self.energy, self.asked = watts, 0.0, 0

    def read(self) -> Reading | None:
        self.asked += 1
        return Reading({"board_w": self.watts, "gpu_c": 50.0 + self.asked}, frozenset({"heat"}))

    def counters(self) -> dict[str, float]:
        self.energy += 10
        return {"gpu_j": self.energy}

    def memory(self, pid: int) -> int | None:
        return 5 if pid == 1 else None

    def close(self) -> None:
        pass


def test_a_turn_is_read_from_its_beginning_to_its_end() -> None:
    telemetry, log = Telemetry([Meters(20.0)]), Log()
    for _ in range(2):
        with telemetry.turn(log):
            time.sleep(0.01)
    found = log.summary(images=2)
    assert log.samples == 2  # at the end of each
    assert found["joules_per_image"]["gpu"] == 10
    assert found["joules_per_image"]["board"] == pytest.approx(20.0 * log.seconds / 2)
    assert found["watts"]["board"] == 20.0
    assert found["watts"]["gpu"] == pytest.approx(20 / log.seconds)
    assert found["gpu_c"] == {"min": 52, "mean": 53, "max": 54}  # 51, 53: what came before a turn
    assert found["limited_by"] == {"heat": 1.0}
    assert telemetry.memory(1) == 5
    assert telemetry.memory(2) is None


def test_what_two_sources_tell_counts_once() -> None:
    log = Log()
    log.add([Reading({"gpu_c": 50.0}), Reading({"gpu_c": 60.0, "cpu_c": 40.0})])
    assert log.gauges == {"gpu_c": [50.0], "cpu_c": [40.0]}


def test_nothing_told_is_nothing_in_the_record() -> None:
    telemetry, log = Telemetry([]), Log()
    with telemetry.turn(log):
        pass
    assert log.summary(images=1) == {}


def test_a_program_that_prints_is_followed_and_ended() -> None:
    script = "import time\nprint('7', flush=True)\nprint('x', flush=True)\ntime.sleep(60)"

    def parse(line: str) -> Reading | None:
        return Reading({"cpu_c": float(line)}) if line.strip().isdecimal() else None

    lines = Lines([sys.executable, "-c", script], parse)
    found = until(lines.read)
    assert found == Reading({"cpu_c": 7.0})
    assert lines.read() is None  # once
    lines.close()
    assert lines._process.returncode is not None
