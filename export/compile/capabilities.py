"""Which GPU computes what, so that a build that cannot work is refused before it begins.

A target is an architecture (`sm89`) or a card's name (`rtx-4090`). The table is of architectures,
because that is what engines are compiled for; the names only lead to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bifrost_rt.strict import nearest
from export.errors import CompileError

# The names of the command line; the manifest's dtypes lead to them.
DTYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int8": "int8",
    "float8_e4m3fn": "fp8",
    "float4_e2m1fn": "nvfp4",
    "uint4": "nvfp4",  # its codes, in graphs for a CPU
}


@dataclass(frozen=True)
class Architecture:
    """What GPUs of one compute capability compute in, and which builders compile for them."""

    title: str
    precisions: tuple[str, ...]
    builders: tuple[str, ...]


# TensorRT-RTX has no float32 products for Turing, and every set keeps some: `float32_layers`.
_TURING = ("fp32", "fp16", "int8")
_AMPERE = ("fp32", "fp16", "bf16", "int8", "int4")
_ADA = (*_AMPERE, "fp8")
_BLACKWELL = (*_ADA, "nvfp4")
_BOTH = ("tensorrt-rtx", "tensorrt")
ARCHITECTURES = {
    "sm75": Architecture("Turing: RTX 20, GTX 16", _TURING, ("tensorrt",)),
    "sm80": Architecture("Ampere: A100, A30", _AMPERE, _BOTH),
    "sm86": Architecture("Ampere: RTX 30, RTX A", _AMPERE, _BOTH),
    "sm87": Architecture("Ampere: Jetson Orin", _AMPERE, ("tensorrt",)),
    "sm89": Architecture("Ada: RTX 40, L4, L40", _ADA, _BOTH),
    "sm90": Architecture("Hopper: H100, H200", _ADA, ("tensorrt",)),
    "sm110": Architecture("Blackwell: Jetson Thor", _BLACKWELL, ("tensorrt",)),
    "sm120": Architecture("Blackwell: RTX 50, RTX PRO", _BLACKWELL, _BOTH),
    "sm121": Architecture("Blackwell: DGX Spark", _BLACKWELL, _BOTH),
}
# A card's name may go on: rtx-4070-ti-super, rtx-3060-12gb, jetson-orin-nano-super.
_NAMES = (
    (r"gtx-16[56]0|rtx-20[5678]0", "sm75"),
    (r"a100|a30", "sm80"),
    (r"rtx-30[56789]0|rtx-a[2456][05]00", "sm86"),
    (r"jetson-(agx-)?orin", "sm87"),
    (r"rtx-40[56789]0|rtx-[2456][05]00-ada|l4|l40s?", "sm89"),
    (r"h100|h200", "sm90"),
    (r"jetson-(agx-)?thor", "sm110"),
    (r"rtx-50[56789]0|rtx-pro-[2456][05]00", "sm120"),
    (r"dgx-spark", "sm121"),
)
# What to take instead of a quantised format, the best first.
_LESS = {"nvfp4": ("fp8", "int8"), "fp8": ("int8",), "int4": ("int8",)}
_EXAMPLES = ("rtx-2080", "rtx-3060", "rtx-4090", "rtx-5090", "jetson-agx-orin", "dgx-spark")


def architecture(target: str) -> str:
    """`rtx-4090` -> `sm89`; an architecture is its own name.

    Raises:
        CompileError: an unknown name.
    """
    name = re.sub(r"[\s_]+", "-", target.strip().lower())
    name = re.sub(r"^(rtx|gtx)(?=\d)", r"\1-", re.sub(r"^(nvidia-|geforce-)+", "", name))
    if name in ARCHITECTURES:
        return name
    for pattern, found in _NAMES:
        if re.fullmatch(rf"(?:{pattern})(?:-.*)?", name):
            return found
    raise CompileError(
        f"target {target!r} is unknown{nearest(name, [*ARCHITECTURES, *_EXAMPLES])}",
        hint="name an architecture (" + ", ".join(ARCHITECTURES) + ") or a card such as rtx-4090",
    )


def check(builder: str, targets: Sequence[str], dtypes: Iterable[str]) -> tuple[str, ...]:
    """The architectures to compile for.

    Args:
        targets: architectures or cards' names; two cards of one architecture are one target.
        dtypes: what the graphs hold and compute in, as the manifest names it.

    Raises:
        CompileError: for the first target that the builder does not compile for, or that lacks one
            of the dtypes, with what would work instead.
    """
    found = tuple(dict.fromkeys(architecture(target) for target in targets))
    wanted = dict.fromkeys(DTYPES.get(dtype, dtype) for dtype in dtypes)
    for name in found:
        about = ARCHITECTURES[name]
        if builder not in about.builders:
            others = [other for other, a in ARCHITECTURES.items() if builder in a.builders]
            raise CompileError(
                f"{builder} does not compile for {name} ({about.title}), only for "
                + ", ".join(others),
                hint=f"use --backend {about.builders[0]}, on the device itself",
            )
        if missing := [precision for precision in wanted if precision not in about.precisions]:
            raise CompileError(
                f"{name} ({about.title}) has no {', '.join(missing)} arithmetic",
                hint="build the set with `python -m export.build "
                f"{_instead(missing, wanted, name)}`; {name} computes in "
                + ", ".join(about.precisions),
            )
    return found


def check_pair(builder: str, stage: str, formats: Iterable[str], compute: str) -> None:
    """Refuse int8 layers within float16 for TensorRT-RTX.

    Its kernels multiply int8 with int8 and store the bare sums in the type around them; the scales
    are applied by the kernel that follows. At the widths of real layers such sums go beyond the
    65504 of float16: the plans of compiled engines show it, and no GPU was asked.

    Args:
        formats: of the stage's layers, as the command line names them.
        compute: the type of everything else.

    Raises:
        CompileError: the stage has this pair.
    """
    if builder == "tensorrt-rtx" and "int8" in formats and compute == "float16":
        raise CompileError(
            f"stage `{stage}`: int8 layers within fp16 overflow: TensorRT-RTX stores their sums, "
            "before the scales are applied, as fp16, whose largest number is 65504",
            hint="compile with --compute bf16, whose range is that of float32",
        )


def _instead(missing: Sequence[str], wanted: Iterable[str], name: str) -> str:
    """The option of the next best: 8 bit for 4 and 8, fp16 for bf16, which of a quantised set is
    what its other weights are in. Where bf16 is missing, the builder is TensorRT: `check_pair`
    refuses int8 within fp16 for TensorRT-RTX, whose cards all have bf16."""
    there = ARCHITECTURES[name].precisions
    for lacking in (precision for precision in missing if precision in _LESS):
        return "--precision " + next(p for p in _LESS[lacking] if p in there)
    return "--rest fp16" if any(p in ("int8", *_LESS) for p in wanted) else "--precision fp16"
