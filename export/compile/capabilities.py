"""Which GPU computes what, so that a build that cannot work is refused before it begins.

A target is an architecture (`sm89`) or a card's name (`rtx-4090`). The table is of architectures,
because that is what engines are compiled for; the names only lead to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bifrost_rt.serialization import nearest
from export import formats
from export.compile.options import TITLES
from export.errors import CompileError
from export.formats import FORMATS, FULL, HALF, OLDEST_HALF, by_age


@dataclass(frozen=True)
class Architecture:
    """GPUs of one compute capability, times ten, and which builders compile for them."""

    capability: int
    title: str
    builders: tuple[str, ...]

    @property
    def precisions(self) -> tuple[str, ...]:
        """What they compute in, as the command line names it."""
        return tuple(declared.name for declared in by_age() if declared.since <= self.capability)


# TensorRT-RTX has no float32 products for Turing, and every set keeps some: `float32_layers`.
_BOTH = ("tensorrt-rtx", "tensorrt")
ARCHITECTURES = {
    f"sm{architecture.capability}": architecture
    for architecture in (
        Architecture(75, "Turing: RTX 20, GTX 16", ("tensorrt",)),
        Architecture(80, "Ampere: A100, A30", _BOTH),
        Architecture(86, "Ampere: RTX 30, RTX A", _BOTH),
        Architecture(87, "Ampere: Jetson Orin", ("tensorrt",)),
        Architecture(89, "Ada: RTX 40, L4, L40", _BOTH),
        Architecture(90, "Hopper: H100, H200", ("tensorrt",)),
        Architecture(110, "Blackwell: Jetson Thor", ("tensorrt",)),
        Architecture(120, "Blackwell: RTX 50, RTX PRO", _BOTH),
        Architecture(121, "Blackwell: DGX Spark", _BOTH),
    )
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
    """Return the architectures to compile for.

    Args:
        targets: architectures or cards' names; two cards of one architecture are one target.
        dtypes: what the graphs hold and compute in, as the manifest names it.

    Raises:
        CompileError: for the first target that the builder does not compile for, or that lacks one
            of the dtypes, with what would work instead.
    """
    found = tuple(dict.fromkeys(architecture(target) for target in targets))
    known = ((dtype, formats.of_type(dtype)) for dtype in dtypes)
    wanted = dict.fromkeys(dtype if fmt is None else fmt.name for dtype, fmt in known)
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


def check_pair(builder: str, stage: str, names: Iterable[str], compute: str) -> None:
    """Refuse layers whose bare sums go beyond the range of what is around them.

    TensorRT-RTX's kernels multiply bytes and store the sums in the type around them; the scales are
    applied by the kernel that follows. At the widths of real layers such sums go beyond the largest
    number of a 16-bit format with a short range.

    Args:
        names: formats of the stage's layers, as the command line names them.
        compute: the type of everything else.

    Raises:
        CompileError: the stage has this pair.
    """
    around = formats.of_type(compute)
    largest = None if around is None else around.runtime.largest
    bare = [n for n in names if n in FORMATS and builder in FORMATS[n].bare_sums]
    if around is not None and largest is not None and bare:
        raise CompileError(
            f"engine `{stage}`: {bare[0]} layers within {around.name} overflow: "
            f"{TITLES[builder]} stores their sums, before the scales are applied, as "
            f"{around.name}, whose largest number is {largest:.0f}",
            hint=f"compile with --compute {HALF.name}, whose range is that of {FULL.dtype}",
        )


def _instead(missing: Sequence[str], wanted: Iterable[str], name: str) -> str:
    """Return the option of the next best: for 4 and 8 bit the newest 8 bit that is there, for 16
    bit the older one, which of a quantized set is what its other weights are in. Where 16 bit of
    the full range is missing, the builder is TensorRT: `check_pair` refuses bare sums in the other
    one for TensorRT-RTX, whose cards all have it."""
    there = ARCHITECTURES[name].precisions
    if any(FORMATS[precision].quantized for precision in missing):
        newest_first = sorted(formats.eight_bit(), key=lambda declared: -declared.since)
        return "--precision " + next(f.name for f in newest_first if f.name in there)
    quantized = any(precision in FORMATS and FORMATS[precision].quantized for precision in wanted)
    return f"--{'fallback' if quantized else 'precision'} {OLDEST_HALF.name}"
