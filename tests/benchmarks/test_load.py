"""The load test itself: a small one that must pass, queue limits included."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.load import main


def test_a_small_load(alpha_set: Path, tmp_path: Path) -> None:
    command = ["--engines", str(alpha_set), "--requests", "24", "--clients", "6"]
    few = ["--num-inference-steps", "4", "--decoding-steps", "2", "--max-waiting", "2"]
    assert main([*command, *few, "--json", str(tmp_path / "load.json")]) == 0
    record = json.loads((tmp_path / "load.json").read_text())
    assert record["answers"] == {"200": 24}
    assert record["refused_with_429"] > 0
    assert record["wait_seconds"]["p50"] <= record["wait_seconds"]["p99"]
    assert record["memory_bytes"]["second_quarter"] > 0
