"""What a compiled engine will do in one call, counted from its plan, and where that is not what was
asked of the builder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

from export.compile.network import Arithmetic
from export.compile.plan_text import BITS, Dim, EnginePlan, Operation, Tensor
from export.formats import FORMATS

UNKNOWN = "unknown"
# the plan's types as the manifest calls them
DTYPES = {
    word: declared.runtime.computes_in or declared.dtype
    for declared in FORMATS.values()
    for word in declared.plan
}
PRODUCTS = ("fully_connected", "corrltn", "runtime_fusion")
HEAD = 16  # attention with heads of a multiple of this width has a kernel; of 8 it may have none
SMALLEST = 1 << 16  # bytes of a weight that matters when it is moved
_HIDDEN = re.compile(r"_myl_\w*(Fc|Corr|Deco)")
_MULTIPLIED = re.compile(r"^_+(gemm|gemv)_mha")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a plan.

    Attributes:
        kind: "product" (with a weight), "attention", "part of attention" (a product of two computed
            tensors, of an attention that was taken apart), "weight" (rewrites nothing but a weight)
            or "other".
        reads, writes: dtypes of what it multiplies, or reads first, and of its first result.
        bytes: that it reads and writes; of tables that it gathers from, the rows. None: not known.
        operations: of its multiplications, a multiply-add counted as two; 0 where it has none.
        layers: of the network.
    """

    name: str
    kind: str
    reads: str
    writes: str
    bytes: int | None
    operations: int | None
    layers: tuple[str, ...]


def kernels(plan: EnginePlan, weights: Collection[str] = ()) -> list[Kernel]:
    """Return the kernels of a plan, in order.

    Args:
        plan: with numbers in its dimensions, where bytes and operations are to be known.
        weights: inputs of the engine that are weights.
    """
    bound = {*weights, *(f"{name}.1" for name in weights)}
    bound |= {t.name for t in plan.tensors.values() if t.base in bound}
    return [_kernel(op, bound) for op in plan.kernels]


def _kernel(op: Operation, bound: Collection[str]) -> Kernel:
    kind: str = "other"
    # a name lists what a kernel does: Fc, Corr and Deco are products
    operations = None if op.kind == "runtime_function" and _HIDDEN.search(op.name) else 0
    first = op.inputs[0].type if op.inputs else ""
    if op.kind in PRODUCTS:
        left, right, operations = _product(op, bound)
        of_weight = right is not None and _is_weight(right, bound)
        computed = left is not None and not of_weight and not _is_weight(left, bound)
        kind = "part of attention" if computed else "product"
        first = left.type if left else UNKNOWN
    elif _MULTIPLIED.match(op.name):
        kind, operations = "attention", _attention(op)
    elif _moves_weight(op, bound):
        kind = "weight"
    result = op.outputs[0].type if op.outputs else ""
    return Kernel(op.name, kind, _dtype(first), _dtype(result), _bytes(op), operations, op.layers)


def _dtype(name: str) -> str:
    return DTYPES.get(name, name)


def _is_weight(tensor: Tensor, bound: Collection[str]) -> bool:
    return tensor.constant or tensor.name in bound


def _product(
    op: Operation, bound: Collection[str]
) -> tuple[Tensor | None, Tensor | None, int | None]:
    """Return what is multiplied, and the operations that it takes."""
    if not op.outputs:
        return None, None, None
    out = op.outputs[0]
    if op.kind == "corrltn" or op.backbone in ("conv", "deconv"):
        return _convolution(op, bound)
    if op.kind == "fully_connected" and len(op.inputs) > 1:
        left, right = op.inputs[:2]
        inner = left.dims[-2 if op.transposed[0] else -1]
        return left, right, _times(2, out.elements, inner)
    # a residual beside them may have a shape that fits, too: weights first
    for right in sorted(op.inputs, key=lambda t: not _is_weight(t, bound)):
        for left in op.inputs:
            if left is not right and _multiply(left, right, out):
                return left, right, _times(2, out.elements, left.dims[-1])
    return None, None, None


def _convolution(
    op: Operation, bound: Collection[str]
) -> tuple[Tensor | None, Tensor | None, int | None]:
    """Return the input, the weight [out, in, …] (transposed: [in, out, …]), and the operations."""
    held = max(
        (t for t in op.inputs if len(t.dims) > 2 and _is_weight(t, bound)),
        key=lambda t: t.elements or 0,
        default=None,
    )
    if held is None or not isinstance(held.dims[0], int):
        return None, held, None
    data = next(
        (t for t in op.inputs if t.type == held.type and not _is_weight(t, bound)),
        None,
    )
    every = data if op.backbone == "deconv" else op.outputs[0]
    if every is None or every.elements is None or held.elements is None:
        return data, held, None
    return data, held, 2 * every.elements * held.elements // held.dims[0]


def _times(*factors: Dim | None) -> int | None:
    numbers = [factor for factor in factors if isinstance(factor, int)]
    return prod(numbers) if len(numbers) == len(factors) else None


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> bool:
    """Say whether two tensors are of one type, and their product has the shape of a third."""
    if min(len(left.dims), len(right.dims), len(out.dims)) < 2:
        return False
    if left.type != right.type or left.dims[-1] != right.dims[-2]:
        return False
    if right.dims[-1] != out.dims[-1]:
        return False
    rows = [dim for dim in left.dims[:-1] if dim != 1]
    return rows == [dim for dim in out.dims[:-1] if dim != 1]


def _attention(op: Operation) -> int | None:
    """Of both products of an attention: queries by keys, and weights by values."""
    if not op.outputs or op.outputs[0].elements is None or len(op.outputs[0].dims) < 2:
        return None
    out = op.outputs[0]
    head = out.dims[-1]
    lengths: Counter[int] = Counter()
    for tensor in op.inputs:  # of queries, keys and values, two have the length of the keys
        last = tensor.dims[-2:]
        if len(tensor.dims) > 2 and tensor.type == out.type and head in last:
            other = last[0] if last[1] == head else last[1]
            if isinstance(other, int):
                lengths[other] += 1
    if not lengths:
        return None
    return 4 * prod(d for d in out.dims if isinstance(d, int)) * lengths.most_common(1)[0][0]


def _moves_weight(op: Operation, bound: Collection[str]) -> bool:
    """Say whether a kernel reads a weight and nothing else of a size, and writes as many
    numbers."""
    if op.kind not in ("function", "copy", "reshape", "cast"):
        return False
    read = [t for t in op.inputs if (t.elements or 0) > 1]
    if not read or not all(_is_weight(t, bound) for t in read):
        return False
    sizes = {t.elements for t in read if (t.bytes or 0) >= SMALLEST}
    written = {t.elements for t in op.outputs}
    return bool(sizes & written) or (bool(sizes) and sum(s or 0 for s in sizes) in written)


def _bytes(op: Operation) -> int | None:
    """Each tensor once as it is read and once as it is written."""
    moved = [*_reads(op).values(), *(tensor.bytes for tensor in op.outputs)]
    return _total(moved)


def _reads(op: Operation) -> dict[Tensor, int | None]:
    """Return what a kernel reads of each of its inputs: of those of a gather, no more than it hands
    on."""
    rows = sum(t.elements or 0 for t in op.outputs) if "Gath" in op.name else None
    found: dict[Tensor, int | None] = {}
    for tensor in op.inputs:
        size = tensor.bytes
        if size is not None and rows is not None:
            size = min(size, -(-rows * BITS[tensor.type] // 8))
        found[tensor] = size
    return found


def least_bytes(plan: EnginePlan, weights: Collection[str] = ()) -> int | None:
    """Return what a call must move whatever its kernels: the weights that it reads, and its inputs
    and outputs, each once. None where a size is not known.

    Args:
        plan: with numbers in its dimensions.
        weights: inputs of the engine that are weights.
    """
    doors = {f"{name}.1" for name in (*plan.inputs, *plan.outputs, *weights)}
    read: dict[str, dict[str, int | None]] = {}
    for op in plan.kernels:
        written = dict.fromkeys(op.outputs)
        for tensor, size in (*_reads(op).items(), *((t, t.bytes) for t in written)):
            origin = tensor.base or tensor.name
            if tensor.constant or origin in doors:
                read.setdefault(origin, {})[tensor.name] = size
    sizes = []
    for origin, parts in read.items():
        total = _total(parts.values())
        whole = plan.tensors[origin].bytes if origin in plan.tensors else None
        sizes.append(total if total is None or whole is None else min(total, whole))
    return _total(sizes)


def describe(plan: EnginePlan | None, weights: Collection[str] = ()) -> dict[str, Any]:
    """Return the report of one engine, as it is written to JSON. What cannot be read is "unknown".

    Args:
        plan: at the sizes that its bytes are counted for.
    """
    if plan is None:
        return {"plan": UNKNOWN}
    found = kernels(plan, weights)
    products = Counter(f"{k.reads} -> {k.writes}" for k in found if k.kind == "product")
    apart = sum(k.kind == "part of attention" for k in found)
    return {
        "plan": "read",
        "kernels": len(found),
        "products": dict(products.most_common()),
        "attention": {
            "fused": sum(k.kind == "attention" for k in found),
            "decomposed": -(-apart // 2),
        },
        "capturable": UNKNOWN if plan.capturable is None else plan.capturable,
        "auxiliary_streams": _said(None if plan.streams is None else plan.streams - 1),
        "weights_moved": dict(Counter(k.name for k in found if k.kind == "weight")),
        "bytes": _said(_total(k.bytes for k in found)),
        "operations": _said(_total(k.operations for k in found)),
    }


def contradictions(
    plan: EnginePlan, asked: Arithmetic, weights: Collection[str] = ()
) -> tuple[str, ...]:
    """Say where a plan does something else than the network says, one sentence each.

    Args:
        asked: what the network that was compiled computes in.
        weights: inputs of the engine that are weights.
    """
    said: dict[str, None] = {}
    if plan.capturable is False:
        said["a call of it cannot be recorded as a CUDA graph"] = None
    for kernel in kernels(plan, weights):
        named = [layer for layer in kernel.layers if layer in asked.layers]
        if kernel.kind == "product" and named and kernel.reads != UNKNOWN:
            wanted = {asked.layers[layer] for layer in named}
            if kernel.reads not in wanted:
                said[
                    f"{', '.join(named)} multiplies {kernel.reads}, where the network says "
                    f"{' or '.join(sorted(wanted))}"
                ] = None
        if kernel.kind == "part of attention" and kernel.reads != "float32":
            for layer in kernel.layers:
                if layer in asked.heads and asked.heads[layer] % HEAD == 0:
                    said[
                        f"{layer}, with heads of width {asked.heads[layer]}, is several kernels, "
                        "where one has the scores in fast memory"
                    ] = None
    return tuple(said)


def _total(numbers: Iterable[int | None]) -> int | None:
    held = list(numbers)
    known = [number for number in held if number is not None]
    return sum(known) if len(known) == len(held) else None


def _said(number: int | None) -> int | str:
    return UNKNOWN if number is None else number
