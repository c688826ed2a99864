"""Which driver runs a set where nobody names one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bifrost_rt import backends
from bifrost_rt.backends.choice import choose, processor_features
from bifrost_rt.manifest import EngineSpec, Manifest, Precision
from tests.unit.test_request import FACTS

AMX, PLAIN = frozenset({"avx512_vnni", "amx_int8"}), frozenset({"avx512_vnni"})


def a_set(form: str, backend: str = "onnxruntime") -> Manifest:
    """With one engine of one layer."""
    precision = Precision(form, form, "float32", {form: 1})
    engine = EngineSpec("denoise", "", (), (), (), {}, precision)
    return dataclasses.replace(FACTS, backend=backend, engines=(engine,))


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    for name in names:
        driver = dataclasses.replace(backends.DRIVERS[name], library=f"{name}_that_is_not_there")
        monkeypatch.setitem(backends.DRIVERS, name, driver)


def test_int8_on_a_matrix_unit_is_openvinos() -> None:
    found = choose(a_set("int8"), AMX)
    assert (found.name, found.reason) == ("openvino", "the faster one for int8 on this processor")


@pytest.mark.parametrize(("form", "features"), [("int8", PLAIN), ("fp32", AMX), ("bf16", PLAIN)])
def test_the_rest_is_onnxruntimes(form: str, features: frozenset[str]) -> None:
    found = choose(a_set(form), features)
    assert (found.name, found.reason) == (
        "onnxruntime",
        "as fast as openvino here, in half of the memory",
    )


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
def test_what_openvino_refuses_is_never_given_to_it(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "onnxruntime")
    assert choose(a_set(form), AMX).name == "onnxruntime"


def test_the_other_one_where_the_first_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino")
    found = choose(a_set("int8"), AMX)
    assert found.name == "onnxruntime"
    assert found.reason.startswith("openvino would be the choice, but the Python package")
    without(monkeypatch, "onnxruntime")
    assert choose(a_set("fp32"), PLAIN).name == "onnxruntime"  # its error says what to install


def test_a_compiled_set_has_no_choice() -> None:
    found = choose(a_set("int8", "tensorrt-rtx"), AMX)
    assert (found.name, found.reason) == ("tensorrt-rtx", "the set was built for it")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux says what a processor has")
def test_the_processor_has_something() -> None:
    assert processor_features()
