"""What a processor is taken for, from what the system tells of it."""

from __future__ import annotations

import dataclasses

import pytest

from bifrost_rt import processor as processors
from bifrost_rt.processor import FEATURES, Processor, describe, described, saturation
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

X86 = """processor\t: 0
model name\t: Some Xeon
flags\t\t: fpu avx2 avx_vnni

processor\t: 1
model name\t: Some Xeon
flags\t\t: fpu avx2 avx_vnni
"""
ARM_TEXT = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd asimddp i8mm\n"


@pytest.fixture(autouse=True)
def _no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process may have been started with."""
    for name in processors.LIMITS:
        monkeypatch.delenv(name, raising=False)


@named(*WITHOUT_VNNI)
def test_sums_saturate_without_vnni(processor: Processor) -> None:
    assert processor.saturates
    assert not processor.vnni


@named(*WITH_VNNI, ARM)
def test_sums_are_exact_with_vnni_and_beyond_x86(processor: Processor) -> None:
    assert not processor.saturates
    assert processor.amx == (processor is AMX)


def test_wide_kernels_need_vnni_of_their_own() -> None:
    """Libraries prefer AVX-512, so a narrow VNNI beside a wide unit without it is never used."""
    mixed = dataclasses.replace(
        AVX512_WITHOUT_VNNI, features=AVX512_WITHOUT_VNNI.features | {"avx_vnni"}
    )
    assert mixed.saturates


def test_linux_tells_the_model_and_what_it_has() -> None:
    found = described(X86, "x86_64")
    assert found == Processor("x86", frozenset({"fpu", "avx2", "avx_vnni"}), "Some Xeon")
    found = described(ARM_TEXT, "aarch64", "")
    assert (found.machine, found.name) == ("arm", "aarch64")
    assert found.features == {"fp", "asimd", "asimddp", "i8mm"}


def test_what_only_some_cores_have_does_not_count() -> None:
    mixed = X86.replace("avx2 avx_vnni\n", "avx2\n", 1)
    assert described(mixed, "x86_64").features == {"fpu", "avx2"}


@pytest.mark.parametrize("machine", ["AMD64", "x86_64"])
def test_a_system_that_does_not_tell_is_taken_for_the_worst(machine: str) -> None:
    assert described("", machine).saturates
    # an x86 program on an emulator sees the file of the processor below
    assert described(ARM_TEXT, machine).saturates


def test_this_machine_is_known_where_linux_tells() -> None:
    processors.here.cache_clear()
    here = processors.here()
    assert here.known == processors.CPUINFO.exists()
    assert here.name


@pytest.mark.parametrize(
    ("value", "processor", "saturates"),
    [
        ("AVX2", AMX, True),
        ("avx2", AVX512_VNNI, True),
        ("SSE41", AVX_VNNI, True),
        ("AVX512_CORE", AMX, True),
        ("AVX2_VNNI", AVX_VNNI, False),
        ("AVX2_VNNI", AVX512_VNNI, True),  # has the wide one alone
        ("AVX2_VNNI", AMX, False),
        ("AVX512_CORE_VNNI", AVX512_VNNI, False),
        ("AVX512_CORE_VNNI", AVX_VNNI, True),
        ("AVX512_CORE_BF16", AMX, False),
        ("AVX10_1_512", AVX_VNNI, False),
        ("DEFAULT", AMX, False),
        ("nonsense", AVX512_VNNI, False),
        ("", AVX512_VNNI, False),
    ],
)
@pytest.mark.parametrize("name", processors.LIMITS)
def test_a_setting_hides_features_from_onednn(
    name: str, value: str, processor: Processor, saturates: bool
) -> None:
    limited = processor.under_onednn({name: value})
    assert limited.saturates == saturates
    if saturates:
        assert limited.limit == f"{name}={value}"


def test_amx_can_be_hidden_alone() -> None:
    limited = AMX.under_onednn({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"})
    assert limited.vnni
    assert not limited.amx


def test_the_newer_name_of_the_setting_counts() -> None:
    both = {"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "DEFAULT"}
    assert not AVX512_VNNI.under_onednn(both).saturates


def test_a_setting_that_hides_nothing_is_not_blamed() -> None:
    limited = AVX2.under_onednn({"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert limited == AVX2
    assert (
        saturation(limited)
        == "on x86 without VNNI its sums saturate in 16 bit, and this one has none"
    )


@named(*KINDS)
def test_every_kind_is_described_in_three_lines(processor: Processor) -> None:
    model, first, second = describe(processor)
    assert model.startswith(f"{processor.name}: ")
    for feature in processor.features & set(FEATURES):
        assert feature in model
    assert first.startswith("int8 in onnxruntime: exact")
    assert ("precise mode" in first) == processor.saturates
    assert second.startswith("int8 in openvino: ")
    assert ("refused here" in second) == processor.saturates
    assert ("not tried" in second) == (processor.machine != "x86")


def test_an_unknown_processor_is_said_to_be_one() -> None:
    model, first, second = describe(UNKNOWN_X86)
    assert model == "AMD64: this system does not tell what it has"
    assert "may have no VNNI" in first
    assert "this system does not tell whether this one has it" in second
