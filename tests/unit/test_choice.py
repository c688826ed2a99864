"""Which backend runs a set where nobody names one."""

from __future__ import annotations

import dataclasses

import pytest

from bifrost_rt import backends
from bifrost_rt import processor as processors
from bifrost_rt.backends.choice import choose, openvino_refuses
from bifrost_rt.manifest import EngineSpec, Manifest, Precision
from bifrost_rt.processor import Processor
from tests.processors import (
    AMX,
    ARM,
    AVX2,
    AVX512_VNNI,
    AVX512_WITHOUT_VNNI,
    AVX_VNNI,
    KINDS,
    UNKNOWN_X86,
    WITH_VNNI,
    WITHOUT_VNNI,
    named,
)
from tests.unit.test_request import FACTS

MEASURED = "as fast as openvino on a processor with VNNI, in half of the memory"
NOT_MEASURED = "the default; openvino was not compared with it on this kind of processor"
FASTER = "the faster one for int8 on a processor with AMX"


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process may have been started with."""
    for name in processors.LIMITS:
        monkeypatch.delenv(name, raising=False)


def a_set(fmt: str, backend: str = "onnxruntime") -> Manifest:
    """With one engine of one layer."""
    precision = Precision(fmt, fmt, "float32", {fmt: 1})
    engine = EngineSpec("denoise", "", (), (), (), (), precision)
    return dataclasses.replace(FACTS, backend=backend, engines=(engine,))


def without(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """As if these packages were not installed."""
    for name in names:
        backend = dataclasses.replace(backends.BACKENDS[name], library=f"{name}_that_is_not_there")
        monkeypatch.setitem(backends.BACKENDS, name, backend)


def test_int8_on_a_matrix_unit_is_openvinos() -> None:
    found = choose(a_set("int8"), AMX)
    assert (found.name, found.reason) == ("openvino", FASTER)


def test_a_matrix_unit_that_is_hidden_from_openvino_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    found = choose(a_set("int8"), AMX)
    assert (found.name, found.reason) == ("onnxruntime", NOT_MEASURED)


@pytest.mark.parametrize("fmt", ["fp32", "fp16", "bf16", "int8"])
def test_a_reason_is_what_was_measured_on_that_kind_of_processor(fmt: str) -> None:
    found = choose(a_set(fmt), AVX512_VNNI)
    assert (found.name, found.reason) == ("onnxruntime", MEASURED)


@pytest.mark.parametrize(
    ("fmt", "processor"),
    [
        *(("fp32", kind) for kind in KINDS if kind is not AVX512_VNNI),
        *(("int4", kind) for kind in KINDS),
        *(("int8", kind) for kind in (AVX_VNNI, ARM)),
    ],
)
def test_what_was_not_measured_is_not_claimed(fmt: str, processor: Processor) -> None:
    found = choose(a_set(fmt), processor)
    assert (found.name, found.reason) == ("onnxruntime", NOT_MEASURED)


@named(*WITHOUT_VNNI)
def test_int8_is_never_given_to_openvino_where_it_saturates(
    processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        found = choose(a_set("int8"), processor)
        assert found.name == "onnxruntime"
        assert found.reason == "the only one that computes int8 exactly on this processor"
        without(monkeypatch, "onnxruntime")  # its error says what to install


def test_a_setting_that_makes_openvino_saturate_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert choose(a_set("int8"), AMX).name == "onnxruntime"
    refused = openvino_refuses({"int8", "bf16"}, AMX)
    assert refused is not None
    reason, hint = refused
    assert "wrong int8 values on Sapphire Rapids" in reason
    assert "ONEDNN_MAX_CPU_ISA=AVX2 hides what this one has" in reason
    assert hint.startswith("unset ONEDNN_MAX_CPU_ISA, or run this set with backend='onnxruntime'")


@pytest.mark.parametrize(
    ("processor", "why"),
    [
        (AVX2, "this one has none"),
        (AVX512_WITHOUT_VNNI, "this one has none"),
        (UNKNOWN_X86, "this system does not tell whether this one has it"),
    ],
)
def test_the_refusal_says_why_and_what_to_do(processor: Processor, why: str) -> None:
    refused = openvino_refuses({"int8"}, processor)
    assert refused is not None
    assert refused[0].endswith(f"on x86 without VNNI its sums saturate in 16 bit, and {why}")
    assert refused[1].startswith("run this set with backend='onnxruntime'")


@named(*WITH_VNNI, ARM)
def test_int8_is_not_refused_elsewhere(processor: Processor) -> None:
    assert openvino_refuses({"int8"}, processor) is None


@named(*KINDS)
def test_what_computes_in_float_is_refused_nowhere(processor: Processor) -> None:
    assert openvino_refuses({"fp32", "bf16", "fp16", "int4"}, processor) is None


@pytest.mark.parametrize("fmt", ["fp8", "nvfp4"])
def test_what_openvino_refuses_is_never_given_to_it(
    fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "onnxruntime")
    assert choose(a_set(fmt), AMX).name == "onnxruntime"


def test_the_other_one_where_the_first_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "openvino")
    found = choose(a_set("int8"), AMX)
    assert found.name == "onnxruntime"
    assert found.reason.startswith("openvino would be the choice, but the Python package")
    without(monkeypatch, "onnxruntime")
    assert (
        choose(a_set("fp32"), AVX512_VNNI).name == "onnxruntime"
    )  # its error says what to install


def test_a_compiled_set_has_no_choice() -> None:
    found = choose(a_set("int8", "tensorrt-rtx"), AMX)
    assert (found.name, found.reason) == ("tensorrt-rtx", "the set was built for it")
