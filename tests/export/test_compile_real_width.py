"""Layers at the widths of the 7B model and FLUX.1-dev through the real builder: minutes and
gigabytes are what the tiny models cannot show. Run with `pytest -m slow -s tests/export`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import compiling
from export.compile.compiled_set import FIXED, PEAK

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stage", ["visual_decode", "denoise"])
def test_a_layer_compiles(tmp_path: Path, stage: str) -> None:
    rows = {}
    for row in compiling.measure(tmp_path, [stage], layers=1):
        print("\n", row)
        rows[row["compute"], row["weights"]] = row
    assert tuple(rows) == compiling.CASES
    exact, half = rows["fp32", "baked"], rows["bf16", "baked"]
    assert half["weights_mb"] < 0.52 * exact["weights_mb"]
    for compute, dtype in (("bf16", "bfloat16"), ("int8", "int8"), ("fp8", "float8_e4m3fn")):
        inside, outside = rows[compute, "baked"], rows[compute, "bound"]
        assert inside["computes_in"] == outside["computes_in"] == dtype
        assert inside["engine_mb"] < 1.02 * inside["weights_mb"]
        assert inside["peak_mb"] < PEAK * inside["weights_mb"] + FIXED / 1e6
        assert outside["weights_mb"] == pytest.approx(inside["weights_mb"], rel=0.01)
        assert outside["engine_mb"] < 20
        assert outside["peak_mb"] < min(inside["peak_mb"], 2000)
        if compute != "bf16":
            assert inside["weights_mb"] < 0.6 * half["weights_mb"]
