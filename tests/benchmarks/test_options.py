"""What the options cost: every one is drawn, compared with the exact image, and in the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import options
from bifrost_rt import schedules


def test_every_option_has_its_line(
    alpha_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    assert options.main(["--engines", str(alpha_set), "--limit", "1", "--json", str(path)]) == 0
    exact, *others = json.loads(path.read_text())["options"]
    assert exact["option"] == {}
    assert exact["psnr_min"] == 100.0
    assert exact["speedup"] == {"MLLM": 1.0, "denoising": 1.0, "image": 1.0}
    found = [record["option"] for record in others]
    assert {"cache_interval": 2} in found
    assert {"decoding_steps": 8} in found
    assert {"decoding_steps": 8, "cache_interval": 2} in found
    assert all(10 < record["psnr_mean"] < 100 for record in others)  # another image, not noise
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 1 + len(others)
    assert "| `cache_interval=2` |" in "\n".join(lines)


def test_fewer_steps_cost_what_an_interval_costs() -> None:
    """Three steps are always computed, then every n-th."""
    assert [sum(schedules.computed_steps(28, n)) for n in (1, 2, 3)] == [28, 15, 11]
    compared = options.variants(16, 28)
    assert {"num_inference_steps": 15} in compared
    assert {"num_inference_steps": 11} in compared
