"""float8 weights.

Plain ones are their own values. Scaled ones are multiplied: by one number, by one for each row, or
by one for each block of 128 x 128. Names of the scale of `a.weight`:

    a.scale_weight        ComfyUI, beside a tensor `scaled_fp8`
    a.weight_scale        ComfyUI since it writes `a.comfy_quant`; compressed-tensors
    a.weight_scale_inv    transformers, DeepSeek; it multiplies too, in spite of its name
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from export.errors import CheckpointError
from export.stored import FLOATS, Entry, Rows

CODES = ("F8_E4M3", "F8_E5M2")
SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
# Of the arithmetic that other programs do with them.
UNREAD = ("scale_input", "input_scale", "comfy_quant")
MARKER = "scaled_fp8"
BLOCK = 128


def unpack(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the tensors of a model with its float8 weights as what they stand for; scales are
    gone.

    bfloat16 holds every float8; products with a scale are float32.

    Raises:
        CheckpointError: a scale of an unknown name, of a wrong type or shape, or several.
    """
    packed = [name for name, entry in entries.items() if entry.dtype in CODES and entry.shape != ()]
    packed = [name for name in packed if not name.endswith(MARKER)]
    if not packed:
        return dict(entries)
    siblings: dict[str, list[str]] = {}
    for name in entries:
        siblings.setdefault(name.rpartition(".")[0], []).append(name)
    found = dict(entries)
    for name in packed:
        owner, _, leaf = name.rpartition(".")
        scale = None
        if leaf == "weight":
            beside = {n.rpartition(".")[2]: n for n in siblings[owner]}
            scale = _scale(entries, name, beside)
            for other in (*SCALES, *UNREAD):
                found.pop(beside.get(other, ""), None)
        found[name] = _plain(entries[name]) if scale is None else _scaled(entries[name], scale)
    return {name: e for name, e in found.items() if name.rpartition(".")[2] != MARKER}


def _scale(entries: Mapping[str, Entry], name: str, beside: Mapping[str, str]) -> Entry | None:
    weight = entries[name]
    # `a.scale` alone is a norm's
    unknown = [n for leaf, n in beside.items() if "scale" in leaf and leaf not in SCALES + UNREAD]
    known = [beside[leaf] for leaf in SCALES if leaf in beside]
    if unknown or len(known) > 1:
        raise CheckpointError(
            f"{weight.file}: tensor {name} is {weight.dtype} with "
            f"{' and '.join([*known, *unknown])} beside it, expected one of " + ", ".join(SCALES),
            hint="give the model before it was quantized",
        )
    if not known:
        return None
    scale = entries[known[0]]
    if scale.dtype not in FLOATS:
        raise CheckpointError(
            f"{scale.file}: tensor {known[0]} is {scale.dtype}, expected " + ", ".join(FLOATS)
        )
    if _kind(weight.shape, scale.shape) is None:
        raise CheckpointError(
            f"{scale.file}: tensor {known[0]} has the shape {list(scale.shape)}, expected one "
            f"number, one for each row or one for each {BLOCK} x {BLOCK} of {name} "
            f"{list(weight.shape)}",
            hint="give the model before it was quantized",
        )
    return scale


def _kind(weight: tuple[int, ...], scale: tuple[int, ...]) -> str | None:
    if math.prod(scale) == 1:
        return "one"
    if scale in ((weight[0],), (weight[0], *[1] * (len(weight) - 1))):
        return "rows"
    if len(weight) == 2 and scale == tuple(-(-side // BLOCK) for side in weight):
        return "blocks"
    return None


def _plain(entry: Entry) -> Entry:
    return dataclasses.replace(
        entry, gives=torch.bfloat16, read=lambda rows: entry.read(rows).to(torch.bfloat16)
    )


def _scaled(entry: Entry, scale: Entry) -> Entry:
    return dataclasses.replace(
        entry,
        dtype=f"{entry.dtype} with scales",
        identity=f"{entry.identity}*{scale.identity}",
        gives=torch.float32,
        read=functools.partial(_product, entry, scale),
    )


def _product(entry: Entry, scale: Entry, rows: Rows) -> Tensor:
    values = entry.read(rows).float()
    factors = scale.read(None).float()
    first, behind = rows or (0, entry.shape[0])
    kind = _kind(entry.shape, scale.shape)
    if kind == "one":
        return values.mul_(factors.reshape(()))
    if kind == "rows":
        return values.mul_(factors.flatten()[first:behind].view(-1, *[1] * (values.dim() - 1)))
    for row in range(first - first % BLOCK, behind, BLOCK):
        part = values[max(row - first, 0) : row + BLOCK - first]
        part.mul_(factors[row // BLOCK].repeat_interleave(BLOCK)[: entry.shape[1]])
    return values
