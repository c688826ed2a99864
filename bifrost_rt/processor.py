"""The processor: what it has, and what that means for layers in 8 bit.

x86 multiplies unsigned by signed bytes. Without VNNI, libraries do that with `vpmaddubsw`, which
adds two products in 16 bit: 2 · 255 · 127 does not fit, the sum saturates, and the layer is wrong
by up to a sixth of its largest value. Nothing reports it. VNNI adds four products in 32 bit.

What a system does not tell is taken for absent: an unknown x86 processor counts as one without
VNNI, which costs speed and is never wrong.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# What decides speed and exactness of these networks, as Linux calls it.
FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_int8", "amx_bf16", "amx_fp16"),
    *("asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)
AVX512 = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})
# Settings of oneDNN, the library below OpenVINO: the first that is set counts. A value hides
# features whose names begin so; other values hide nothing of interest here. Tried with OpenVINO
# 2026.4.1: AVX512_CORE and below saturate, AVX512_CORE_VNNI and above do not.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
HIDDEN = {
    **dict.fromkeys(("SSE41", "AVX", "AVX2"), ("avx512", "avx_vnni", "amx")),
    **dict.fromkeys(("AVX2_VNNI", "AVX2_VNNI_2"), ("avx512", "amx")),
    "AVX512_CORE": ("avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx"),
    "AVX512_CORE_VNNI": ("avx512_bf16", "avx512_fp16", "avx_vnni", "amx"),
    "AVX512_CORE_BF16": ("avx512_fp16", "avx_vnni", "amx"),
    **dict.fromkeys(("AVX512_CORE_FP16", "AVX10_1_512"), ("amx",)),
}


@dataclass(frozen=True)
class Processor:
    """One kind of processor.

    Attributes:
        machine: "x86", "arm", or what the system calls another one.
        features: as Linux calls them; empty where the system does not tell.
        name: the model.
        limit: the setting that hides features from a library, where one does.
    """

    machine: str
    features: frozenset[str] = frozenset()
    name: str = ""
    limit: str = ""

    @property
    def known(self) -> bool:
        """Whether the system tells what it has."""
        return bool(self.features)

    @property
    def vnni(self) -> bool:
        """Whether it adds products of bytes in 32 bit. Libraries take the kernels of AVX-512 where
        they can, so there it must be AVX-512's own."""
        own = "avx512_vnni" if self.features >= AVX512 else "avx_vnni"
        return self.machine == "x86" and own in self.features

    @property
    def amx(self) -> bool:
        """Whether it has a matrix unit for 8 bit."""
        return self.vnni and "amx_int8" in self.features

    @property
    def saturates(self) -> bool:
        """Whether sums of products of bytes may saturate in 16 bit."""
        return self.machine == "x86" and not self.vnni

    def under_onednn(self, environment: Mapping[str, str] | None = None) -> Processor:
        """As oneDNN uses it, which a setting can keep from what the processor has.

        Args:
            environment: None takes this process's.
        """
        given = os.environ if environment is None else environment
        name = next((name for name in LIMITS if given.get(name)), None)
        if name is None:
            return self
        value = given[name]
        hidden = HIDDEN.get(value.upper(), ())
        left = frozenset(feature for feature in self.features if not feature.startswith(hidden))
        if not hidden or left == self.features:
            return self
        return replace(self, features=left, limit=f"{name}={value}")


@functools.cache
def here() -> Processor:
    """Return this machine's."""
    text = CPUINFO.read_text() if CPUINFO.exists() else ""
    return described(text, platform.machine(), platform.processor())


def described(cpuinfo: str, machine: str, name: str = "") -> Processor:
    """Return the processor that Linux describes.

    Args:
        cpuinfo: the text of /proc/cpuinfo, or nothing on other systems. What only some of its cores
            have does not count.
        machine: as `platform.machine()` calls it.
        name: for want of a better one.
    """
    kind = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}.get(
        machine.lower(), machine.lower()
    )
    key = "flags" if kind == "x86" else "Features"
    found: list[frozenset[str]] = []
    for line in dict.fromkeys(cpuinfo.splitlines()):  # cores are mostly alike
        field, _, value = (part.strip() for part in line.partition(":"))
        if field == key:
            found.append(frozenset(value.split()))
        elif field == "model name":
            name = value
    features = frozenset.intersection(*found) if found else frozenset()
    return Processor(kind, features, name or machine)


def describe(processor: Processor) -> list[str]:
    """Lines for a person: the model, its features, and what they mean for int8."""
    has = [name for name in FEATURES if name in processor.features]
    if not processor.known:
        features = "this system does not tell what it has"
    else:
        features = ", ".join(has) or f"none of {', '.join(FEATURES)}"
    return [
        f"{processor.name}: {features}",
        f"int8 in onnxruntime: {_in_onnxruntime(processor)}",
        f"int8 in openvino: {_in_openvino(processor.under_onednn())}",
    ]


def saturation(processor: Processor) -> str | None:
    """Say why sums of products of bytes may be wrong on a processor, as one phrase; None where they
    are exact."""
    if not processor.saturates:
        return None
    if processor.limit:
        missing = f"{processor.limit} hides what this one has"
    elif processor.known:
        missing = "this one has none"
    else:
        missing = "this system does not tell whether this one has it"
    return f"on x86 without VNNI its sums saturate in 16 bit, and {missing}"


def _in_onnxruntime(processor: Processor) -> str:
    if processor.amx:
        return "exact, on the matrix unit (AMX)"
    if processor.vnni:
        return "exact, at full speed (VNNI)"
    if processor.machine == "x86":
        known = "has no VNNI" if processor.known else "may have no VNNI"
        return f"exact by its precise mode, as this processor {known}: slower, in more memory"
    return "exact by its documentation; not tried on this kind of processor"


def _in_openvino(limited: Processor) -> str:
    if wrong := saturation(limited):
        return f"refused here: {wrong}"
    if limited.amx:
        return "exact, on the matrix unit (AMX)"
    return "exact (VNNI)" if limited.vnni else "not tried on this kind of processor"
