"""The estimate of a compiled engine's time, by hand."""

from __future__ import annotations

import pytest

from export.compile.plan_report import Kernel
from export.planning import devices, kernel_report, kernel_times
from export.planning.kernel_times import Calls

GB = 10**9


def kernel(kind: str, reads: str, moved: int, operations: int, name: str = "__myl_Add") -> Kernel:
    return Kernel(name, kind, reads, "bfloat16", moved, operations, ("node_linear_3",))


CALLS = Calls(
    "denoise",
    28,
    (
        kernel("product", "int8", GB, 66_060 * GB, "node_MatMul_1"),  # 100 ms at 660.6 * 10^12
        kernel("product", "int8", 1008 * GB, GB, "node_MatMul_2"),  # 1 s at 1008 GB/s
        kernel("attention", "bfloat16", GB, 16_520 * GB, "_gemm_mha_v2"),  # 100 ms at 165.2
        kernel("other", "bfloat16", 504 * GB, 0),  # 500 ms
    ),
    least_bytes=504 * GB,
)


def test_each_kernel_takes_the_larger_of_bytes_and_operations() -> None:
    found = kernel_times.estimate([CALLS], devices.find("rtx-4090"))
    assert found is not None
    (engine,) = found.engines
    assert engine.seconds == pytest.approx(1.7)
    assert engine.arithmetic_seconds == pytest.approx(0.2, abs=1e-5)
    assert (engine.ideal_seconds, engine.ideal_limit) == (pytest.approx(0.5), "bandwidth")
    assert found.seconds == pytest.approx(28 * 1.7)
    assert found.ideal_seconds == pytest.approx(28 * 0.5)
    assert found.missing_rates == ()
    product, other, attention = engine.kernels
    assert (product.label, product.count, product.limit) == ("product int8", 2, "bandwidth")
    assert product.seconds == pytest.approx(1.1)
    assert (attention.seconds, attention.limit) == (pytest.approx(0.1), "compute")
    assert other.seconds == pytest.approx(0.5)


def test_the_table_says_that_it_is_an_estimate_and_what_takes_the_time() -> None:
    found = kernel_times.estimate([CALLS], devices.find("rtx-4090"))
    assert found is not None
    text = kernel_report.describe(found)
    assert text.startswith("47.6 s an image on GeForce RTX 4090 24 GB, estimated from")
    assert "nothing was measured" in text
    first = next(line for line in text.splitlines() if line.lstrip().startswith("product int8"))
    assert first.split()[-3:] == ["64.7%", "bandwidth", "node_linear_3"]
    image = kernel_report.draw(found)
    assert {"#4e79a7", "#f28e2b", "#9c755f"} <= {
        "#" + "".join(f"{part:02x}" for part in color[1]) for color in image.getcolors(1 << 20)
    }


def test_a_rate_that_is_not_known_is_named() -> None:
    device = devices.find("jetson-agx-thor")
    calls = Calls("vae_decode", 1, (kernel("product", "float32", GB, 10**15),), GB)
    found = kernel_times.estimate([calls], device)
    assert found is not None
    assert found.missing_rates == ("float32",)
    assert found.seconds == pytest.approx(1 / 273)
    assert "rate for float32 is not known: counted by bytes alone" in kernel_report.describe(found)


def test_every_card_of_the_table_is_estimated() -> None:
    for name, device in devices.read(devices.TABLE).items():
        found = kernel_times.estimate([CALLS], device)
        assert found is not None, name
        assert found.seconds >= found.ideal_seconds > 0, name
    assert kernel_times.estimate([CALLS], devices.find("here")) is None
