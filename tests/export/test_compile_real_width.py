"""Layers at the widths of the 7B model and FLUX.1-dev through the real builder: minutes and
gigabytes are what the tiny models cannot show. Run with `pytest -m slow -s tests/export`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import compiling

pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stage", ["visual_decode", "denoise"])
def test_a_layer_compiles(tmp_path: Path, stage: str) -> None:
    rows = list(compiling.measure(tmp_path, [stage], layers=1))
    for row in rows:
        print("\n", row)
    exact, half, outside = rows
    assert half["weights_mb"] < 0.52 * exact["weights_mb"]
    assert half["engine_mb"] < 0.6 * exact["engine_mb"]
    assert outside["weights_mb"] == pytest.approx(half["weights_mb"], rel=0.01)
    assert outside["engine_mb"] < 20
    assert outside["peak_mb"] < half["peak_mb"]
    assert outside["peak_mb"] < 2000
