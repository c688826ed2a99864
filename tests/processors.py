"""Kinds of processors, as Linux describes them: a test that depends on the processor takes each
through the seam, and none depends on the one that it runs on."""

from __future__ import annotations

import pytest

from bifrost_rt.processor import Processor

_AVX512 = "sse2 avx2 avx512f avx512bw avx512dq avx512vl"


def _x86(name: str, features: str) -> Processor:
    return Processor("x86", frozenset(features.split()), name)


AVX2 = _x86("Haswell", "sse2 avx2")
AVX512_WITHOUT_VNNI = _x86("Skylake-SP", _AVX512)
AVX_VNNI = _x86("Alder Lake", "sse2 avx2 avx_vnni")
AVX512_VNNI = _x86("EPYC 9004", f"{_AVX512} avx512_vnni avx512_bf16")
AMX = _x86("Sapphire Rapids", f"{_AVX512} avx512_vnni avx_vnni avx512_bf16 amx_int8 amx_bf16")
UNKNOWN_X86 = Processor("x86", name="AMD64")
ARM = Processor("arm", frozenset({"asimd", "asimddp", "i8mm"}), "aarch64")

WITHOUT_VNNI = (AVX2, AVX512_WITHOUT_VNNI, UNKNOWN_X86)
WITH_VNNI = (AVX_VNNI, AVX512_VNNI, AMX)
KINDS = (*WITHOUT_VNNI, *WITH_VNNI, ARM)


def named(*kinds: Processor) -> pytest.MarkDecorator:
    """Run a test for each of these kinds, as its argument `processor`."""
    return pytest.mark.parametrize("processor", kinds, ids=lambda kind: kind.name)
