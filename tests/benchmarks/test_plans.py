"""The benchmark of plans: its arithmetic by hand, and a real engine of its smallest part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import plans
from export.compile.plan_report import Kernel
from export.errors import RecipeError
from export.planning import devices
from export.planning.kernel_times import Calls
from export.synthetic.shapes import PRESETS

GB = 10**9


def kernel(kind: str, reads: str, moved: int, operations: int) -> Kernel:
    return Kernel(f"node_{kind}", kind, reads, "bfloat16", moved, operations, ())


CALLS = Calls(
    "denoise",
    1,
    (
        kernel("product", "bfloat16", GB, 16_520 * GB),  # 100 ms at 165.2 * 10^12
        kernel("attention", "bfloat16", GB, 16_520 * GB),
        kernel("weight", "bfloat16", 252 * GB, 0),  # 250 ms at 1008 GB/s
        kernel("other", "bfloat16", 252 * GB, 0),
    ),
    least_bytes=GB,
)


def test_the_ratio_is_the_estimate_over_the_products_alone() -> None:
    found = plans.figures(CALLS, devices.find("rtx-4090"))
    assert (found["kernels"], found["products"], found["moved"]) == (4, 1, 1)
    assert found["bytes"] == 506 * GB
    assert found["seconds"] == pytest.approx(0.7)
    assert found["arithmetic"] == pytest.approx(0.2)
    assert found["ratio"] == 3.5
    assert [time["seconds"] for time in found["slowest"]] == pytest.approx([0.25, 0.25, 0.1, 0.1])


def test_a_rate_that_is_not_known_is_an_error_and_not_a_zero() -> None:
    quarter = Calls("denoise", 1, (kernel("product", "float8_e4m3fn", GB, GB),), GB)
    with pytest.raises(RecipeError, match="rtx-3060-12gb"):
        plans.figures(quarter, devices.find("rtx-3060-12gb"))


def test_a_record_keeps_the_rows_of_other_labels(tmp_path: Path) -> None:
    path, row = tmp_path / "plans.json", {"stage": "denoise", "ratio": 1.5}
    plans.write(path, "before", [row])
    plans.write(path, "after", [{**row, "ratio": 1.25}])
    plans.write(path, "after", [{**row, "ratio": 1.2}])
    states = json.loads(path.read_text())["states"]
    assert {label: [r["ratio"] for r in rows] for label, rows in states.items()} == {
        "before": [1.5],
        "after": [1.2],
    }


def test_two_states_stand_side_by_side() -> None:
    case = {"stage": "denoise", "card": "rtx-4090", "format": "bf16", "branches": 1}
    figures = {"kernels": 77, "products": 9, "streams": 1, "moved": 3, "bytes": 2 * 10**9}
    row = {**case, **figures, "seconds": 2e-3, "arithmetic": 1e-3, "ratio": 2.0}
    baked, bound = ({**row, "weights": weights} for weights in ("baked", "bound"))
    better = {**bound, "kernels": 60, "moved": 0, "seconds": 1.5e-3, "ratio": 1.5}
    text = plans.compared({"a": [baked, bound], "b": [better]}, "a", "b")
    line = "| denoise | rtx-4090 | bf16 | bound | 1 | 77 → 60 | 3 → 0 | 2000 → 2000 "
    assert text.splitlines()[2:] == [line + "| 2.000 → 1.500 | 2.000 → 1.500 |"]


def test_a_real_engine_has_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    monkeypatch.setattr(plans, "shapes", lambda: PRESETS["tiny"])
    path = tmp_path / "plans.json"
    given = ["--stages", "visual_decode", "--cards", "rtx-4090", "--formats", "bf16"]
    assert plans.main([*given, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["states"]["now"]
    assert [(row["weights"], row["branches"]) for row in rows] == [
        *(("baked", 2), ("baked", 1), ("bound", 2), ("bound", 1)),
    ]
    for row in rows:
        # two layers of seven products, Q, K and V joined where the engine holds them, and the head
        assert 8 <= row["products"] <= 2 * 7 + 1
        assert row["moved"] == 0
        assert row["ratio"] == pytest.approx(row["seconds"] / row["arithmetic"], abs=1e-3)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(rows)
