"""The CPU benchmark at true widths, on tiny ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import cpu as benchmark
from benchmarks import interleaving
from bifrost_rt import backends, dims
from bifrost_rt import processor as processors
from bifrost_rt.backends.base import Backend
from bifrost_rt.errors import BackendError
from bifrost_rt.processor import Processor
from tests.processors import AVX2, AVX512_VNNI, named

SIZES = dims.of_run(text_tokens=7, steps=2)
REFUSED = {("int8", "openvino"), ("int8", "openvino-bf16")}  # on processors without VNNI


@named(AVX2, AVX512_VNNI)
def test_a_stage_and_its_largest_layer_on_every_driver(
    processor: Processor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processors, "here", lambda: processor)
    for name in processors.LIMITS:
        monkeypatch.delenv(name, raising=False)
    record = tmp_path / "cpu.json"
    tiny = ["--like", "tiny", "--layers", "2", "--rounds", "2", "--stages", "visual_decode"]
    assert benchmark.main([*tiny, "--json", str(record)]) == 0
    about = json.loads(record.read_text())
    assert about["machine"]["cpu"]["cores"] > 0
    assert about["like"] == "tiny"
    assert {(row["stage"], row["layers"]) for row in about["rows"]} == {("visual_decode", 2)}
    cases = [(form, backend) for form in ("fp32", "int8") for backend in benchmark.BACKENDS]
    refused = [case for case in cases if case in REFUSED and processor.saturates]
    there = [case for case in cases if case not in refused]
    # the gate of an MLP: 16 places of 32 numbers to 48
    for engine, operations in (("16x32 by 32x48", 2 * 16 * 32 * 48), ("visual_decode", None)):
        found = [row for row in about["rows"] if row["engine"] == engine]
        assert [(row["precision"], row["backend"]) for row in found] == refused + there
        assert all("wrong int8 values" in row["failed"] for row in found[: len(refused)])
        found = found[len(refused) :]
        assert found[0]["over_fp32"] == 1.0
        for row in found:
            assert row["ms"] == sorted(row["ms"])
            assert len(row["ms"]) == 2
            assert row["median_ms"] == pytest.approx(sum(row["ms"]) / 2)
            assert row["over_fp32"] == pytest.approx(found[0]["median_ms"] / row["median_ms"])
            if operations:
                assert row["tflops"] == pytest.approx(operations / row["median_ms"] / 1e9)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(about["rows"])
    first = printed[2 + len(refused)]
    assert first.startswith("| 16x32 by 32x48 | fp32 | onnxruntime |")
    assert first.endswith("| 1.00 |")


def test_what_a_driver_cannot_do_is_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO refuses fp8, and one of the backends is not installed."""
    whole = backends.load

    def load(name: str) -> Backend:
        if name == "openvino-bf16":
            raise BackendError("the Python package `openvino` is not installed")
        return whole(name)

    monkeypatch.setattr(backends, "load", load)
    specs = benchmark.product(tmp_path, 16, 32, 48, ("fp32", "fp8"))
    rows = list(benchmark.measure(tmp_path, specs, SIZES, 2))
    failed = {(row["precision"], row["backend"]): row["failed"] for row in rows if "failed" in row}
    assert failed.keys() == {
        *(("fp32", "openvino-bf16"), ("fp8", "openvino-bf16"), ("fp8", "openvino"))
    }
    assert "not installed" in failed["fp32", "openvino-bf16"]
    assert "does not simulate fp8" in failed["fp8", "openvino"]
    assert benchmark.line(rows[1]) == (
        "| 16x32 by 32x48 | fp8 | openvino | – | – | " + failed["fp8", "openvino"] + " |"
    )
    there = [(row["precision"], row["backend"]) for row in rows if "over_fp32" in row]
    assert there == [("fp32", "onnxruntime"), ("fp32", "openvino"), ("fp8", "onnxruntime")]


def test_without_the_driver_to_compare_with_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Backend:
        raise BackendError(f"backend {name!r} is not available", hint="install it")

    monkeypatch.setattr(backends, "load", load)
    specs = benchmark.product(tmp_path, 16, 32, 48, ("fp32",))
    with pytest.raises(BackendError, match="'onnxruntime' is not available"):
        list(benchmark.measure(tmp_path, specs, SIZES, 2))


def test_turns_go_to_and_fro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaving, "SETTLE", 0.0)
    order: list[str] = []
    times = benchmark.turns([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == list("abbaab")
    assert [len(seconds) for seconds in times] == [3, 3]
    assert all(math.isfinite(s) and s >= 0 for seconds in times for s in seconds)
