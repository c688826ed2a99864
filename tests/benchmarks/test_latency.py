"""The latency benchmark's record: complete, in turn, and honest about what it could not see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import figures, latency


def test_the_record_holds_what_the_figures_need(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, picture = tmp_path / "a" / "record.json", tmp_path / "b" / "stages.png"
    arguments = ["--engines", str(alpha_set), "--versus", "reference", "--images", "2"]
    cut = ["--decoding-steps", "4", "--num-inference-steps", "2", "--batches", "2"]
    outputs = ["--json", str(path), "--plot", str(picture)]
    assert latency.main([*arguments, *cut, *outputs]) == 0
    record = json.loads(path.read_text())
    ours, reference = record["contenders"]
    assert ours["images"] == reference["images"] == 2
    assert record["ratio"].keys() == {"mllm", "image"}
    assert record["ratio"] == record["ratio_by_contender"]["reference"]
    assert {"visual_decode", "denoise", "mllm", "total"} <= ours["seconds"].keys()
    assert 0 < ours["host_overhead"] < 1
    assert "host_overhead" not in reference
    for contender in record["contenders"]:
        assert contender["peak_memory_bytes"] > 50e6
        assert contender["load_seconds"] > 0
        assert contender["images_per_second"]["2"] > 0
        assert contender["seconds"]["total"]["min"] <= contender["seconds"]["total"]["p50"]
    assert record["machine"]["cpu"]["cores"] >= 1
    assert picture.stat().st_size > 1000
    assert "reference over" in capsys.readouterr().out


def test_ratios_are_the_others_median_over_ours() -> None:
    ours = [{"mllm": 1.0, "total": 4.0}, {"mllm": 1.0, "total": 4.0}, {"mllm": 9.0, "total": 9.0}]
    other = [{"mllm": 3.0, "total": 6.0}]
    assert figures.ratios(ours, other) == {"mllm": 3.0, "image": 1.5}


def test_host_overhead_is_what_no_engine_accounts_for() -> None:
    image = {"visual_decode": 2.0, "denoise": 1.0, "mllm": 2.0, "total": 4.0}
    assert figures.summarise([image])["host_overhead"] == pytest.approx(0.25)


def test_a_missing_set_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert latency.main(["--engines", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_backend_that_fails_in_its_process_is_reported(
    alpha_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(["--engines", f"{alpha_set}@abacus"]) == 1
    assert "unknown backend 'abacus'" in capsys.readouterr().err
