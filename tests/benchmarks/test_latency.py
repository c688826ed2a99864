"""The latency benchmark's record: complete, in turn, and honest about what it could not see."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import candidates, chart, figures, latency, table
from benchmarks.candidates import Spec
from benchmarks.metering import Meter


def test_the_record_holds_what_the_figures_need(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, plot = tmp_path / "a" / "record.json", tmp_path / "b" / "stages.png"
    versus = ["--versus", "reference", "--versus", "bare", "--versus", "bare@openvino"]
    arguments = ["--engines", str(alpha_set), *versus, "--images", "2"]
    cut = ["--decoding-steps", "4", "--num-inference-steps", "2", "--batches", "2"]
    outputs = ["--json", str(path), "--plot", str(plot)]
    assert latency.main([*arguments, *cut, *outputs]) == 0
    record = json.loads(path.read_text())
    ours, reference, bare, _ = record["candidates"]
    assert [c["images"] for c in record["candidates"]] == [2, 2, 2, 2]
    assert record["ratio"].keys() == {"mllm", "image"}
    assert record["ratio"] == record["ratio_by_contender"]["reference"]
    assert {"visual_decode", "denoise", "mllm", "total"} <= ours["seconds"].keys()
    assert ours["steps"] == {"visual_decode": 4, "denoise": 2}
    assert 0 < ours["host_overhead"] < 1
    assert 0 < bare["host_overhead"] < 1
    assert "host_overhead" not in reference
    for candidate in record["candidates"]:
        assert candidate["peak_memory_bytes"] > 50e6
        assert candidate["load_seconds"] > 0
        assert candidate["images_per_second"]["2"] > 0
        assert candidate["seconds"]["total"]["min"] <= candidate["seconds"]["total"]["p50"]
        assert candidate["image_difference"] <= 1
        cold = candidate["cold_start"]
        assert cold["cpu_seconds"] > 0
        assert cold["seconds"] > candidate["load_seconds"] + candidate["first_image_seconds"]
    assert bare["image_difference"] == 0
    found = [candidate["backend"] for candidate in record["candidates"]]
    assert found == ["onnxruntime", "torch", "onnxruntime", "openvino"]
    for candidate in (ours, bare):
        cold = candidate["cold_start"]
        apart = cold["engines_cpu_seconds"] + cold["beyond_engines_cpu_seconds"]
        assert apart == pytest.approx(cold["cpu_seconds"])
        assert 0 < cold["engines_cpu_seconds"] < cold["cpu_seconds"]
        assert candidate["roofline"]["total"]["percent"] > 0
    assert "engines_cpu_seconds" not in reference["cold_start"]
    assert "roofline" not in reference
    assert "measured" in record["ceilings"]["cpu"]["fp32"]["source"]
    assert record["machine"]["cpu"]["cores"] >= 1
    assert plot.stat().st_size > 1000
    said = capsys.readouterr().out
    for words in ("reference over", "% of the roofline", "ms a step", "cold start", "beyond them"):
        assert words in said


def test_ratios_are_the_others_median_over_ours() -> None:
    ours = [{"mllm": 1.0, "total": 4.0}, {"mllm": 1.0, "total": 4.0}, {"mllm": 9.0, "total": 9.0}]
    other = [{"mllm": 3.0, "total": 6.0}]
    assert figures.ratios(ours, other) == {"mllm": 3.0, "image": 1.5}


def test_host_overhead_is_what_no_engine_accounts_for() -> None:
    image = {"visual_decode": 2.0, "denoise": 1.0, "mllm": 2.0, "total": 4.0}
    assert figures.summarise([image])["host_overhead"] == pytest.approx(0.25)


def test_the_median_image_is_one_that_was_drawn() -> None:
    images = [
        {"visual_decode": v, "denoise": 1.0, "mllm": v, "total": t}
        for v, t in ((5.0, 6.0), (1.0, 2.5), (2.0, 9.0), (3.0, 4.5))
    ]
    assert figures.summarise(images)["median_image"] == images[3]


def row(name: str, total: float, **more: Any) -> dict[str, Any]:
    images = [{"visual_decode": total / 2, "denoise": total / 4, "mllm": total / 2, "total": total}]
    cold = {"seconds": 3.0, "cpu_seconds": 2.0}
    return {
        **{"name": name, "load_seconds": 1.0, "first_image_seconds": 1.0, "cold_start": cold},
        **{"peak_memory_bytes": 1 << 20, "steps": {"denoise": 2}},
        **figures.summarise(images),
        **more,
    }


def record(*rows: dict[str, Any]) -> dict[str, Any]:
    machine = {"cpu": {"name": "a processor", "cores": 2}}
    heat = {"before": 40.0, "after": 71.0}
    return {
        **{"machine": machine, "request": {}, "ceilings": {}, "candidates": list(rows)},
        **{"temperature_c": heat, "ratio_by_contender": {}},
    }


def test_the_table_says_what_the_device_told() -> None:
    told = {
        **{"watts": {"gpu": 250.0}, "joules_per_image": {"gpu": 75.25}},
        **{"gpu_sm_mhz": {"min": 1800.0, "mean": 2200.0, "max": 2520.0}},
        **{"limited_by": {"power_cap": 0.25}, "cpu_core_throttle_events": 4.0},
    }
    device = {"telemetry": told, "peak_device_memory_bytes": 3 << 20, "image_difference": 2}
    text = table.text(record(row("ours", 0.3, **device)))
    for words in (
        *("40 °C before, 71 °C after", "1 MiB, 3 MiB on the device"),
        *("gpu 75.2 J an image at 250 W", "1800 … 2520, mean 2200", "power_cap, 25 % of the time"),
        *("cpu_core_throttle_events 4", "75.00 ms", "37.50 ms a step", "up to 2 of 255"),
    ):
        assert words in text, words


def test_a_bar_is_the_engines_and_the_host() -> None:
    assert chart.parts(row("ours", 0.4)) == pytest.approx(
        {"visual_decode": 200.0, "denoise": 100.0, "host": 100.0}
    )


@pytest.mark.parametrize(("longest", "panels"), [(1.0, 1), (9.0, 2)])
def test_a_long_bar_does_not_hide_the_short(
    longest: float, panels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    shown: list[list[str]] = []

    def look(figure: Figure, *arguments: Any, **named: Any) -> None:
        for axes in figure.axes:
            shown.append([label.get_text() for label in axes.get_yticklabels()])

    monkeypatch.setattr(Figure, "savefig", look)
    chart.draw(record(row("sets/ours", 0.4), row("bare", 0.5), row("reference", longest)), tmp_path)
    assert shown == [["ours", "bare", "reference"], ["ours", "bare"]][:panels]


def test_a_meter_counts_what_overlaps_once_and_stops() -> None:
    meter = Meter()

    def work() -> None:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    before = time.process_time()
    threads = [threading.Thread(target=meter.watch(work)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.04 < meter.cpu_seconds <= time.process_time() - before
    counted, kept = meter.cpu_seconds, meter.watch(work)
    meter.stop()
    assert meter.watch(work) is work
    kept()
    assert meter.cpu_seconds == counted


def test_names_of_contenders(alpha_set: Path) -> None:
    first = f"{alpha_set}@openvino"
    assert candidates.parse(first, first) == Spec(first, str(alpha_set), "openvino")
    plain = str(alpha_set)
    assert candidates.parse(f"{plain}/", first).backend == "onnxruntime"
    assert candidates.parse("bare", first) == Spec("bare", plain, "openvino", "bare")
    assert candidates.parse("bare@onnxruntime", first).backend == "onnxruntime"
    assert candidates.parse("reference-compiled", plain).kind == "reference-compiled"
    assert candidates.parse("reference", plain).device == "cpu"
    on_gpu = candidates.parse("reference@cuda", first)
    assert (on_gpu.kind, on_gpu.device, on_gpu.backend) == ("reference", "cuda", "openvino")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engines", "nowhere"], "nowhere/manifest.json: cannot read an engine set here"),
        (["--engines", "SET@abacus"], "unknown backend 'abacus'"),
        (["--engines", "SET", "--versus", "bare@abacus"], "there is no bare run on 'abacus'"),
        (["--engines", "SET", "--versus", "reference@openvino"], "runs in torch, on no other"),
    ],
)
def test_what_cannot_be_timed_is_one_line(
    alpha_set: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert latency.main([text.replace("SET", str(alpha_set)) for text in arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_without_a_compiler_torch_compile_says_so(
    alpha_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert latency.main(["--engines", str(alpha_set), "--versus", "reference-compiled"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: reference-compiled: torch.compile cannot build kernels here: ")
    assert "C++ compiler" in said
    assert "hint: it needs a C++ compiler and Python's headers: apt install g++" in said
    assert not multiprocessing.active_children()
