"""The plan inside a TensorRT-RTX engine: which kernels it runs, in order, on which tensors.

The engine file holds it as text. Its format is not documented (read from version 1.7): what is not
found there is unknown, which is not the same as wrong. No GPU and no library is needed.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path

from export.formats import FORMATS

Dim = int | str  # a number, or the name of one that the inputs' shapes decide

# bits of one element, by the plan's names of types
BITS = {
    **{word: declared.code_bits for declared in FORMATS.values() for word in declared.plan},
    **dict.fromkeys(("double", "int64"), 64),
    **dict.fromkeys(("tf32", "int32", "uint32"), 32),
    **dict.fromkeys(("fp8_e5m2", "fp8_e8m0", "uint8", "bool"), 8),
    "uint4": 4,
}
_START = re.compile(rb"header \{\n")
_TEXT = re.compile(rb"[\x09\x0a\x0d\x1b-\x7e]+")
_LIST = re.compile(r'"([^"]*)"|([^\s"]+)')


@dataclass(frozen=True)
class Tensor:
    """A tensor of the plan.

    Attributes:
        type: in the plan's words, such as "half" or "fp8_e4m3".
        base: the tensor that this one is a view of; "" for one with memory of its own.
        constant: whether the engine holds its values.
    """

    name: str
    type: str
    dims: tuple[Dim, ...]
    base: str
    constant: bool

    @property
    def elements(self) -> int | None:
        """How many there are, or None where a dimension is not known."""
        sizes = [dim for dim in self.dims if isinstance(dim, int)]
        return prod(sizes) if len(sizes) == len(self.dims) else None

    @property
    def bytes(self) -> int | None:
        """What it takes without padding, or None where that is not known."""
        elements, bits = self.elements, BITS.get(self.type)
        return None if elements is None or bits is None else -(-elements * bits // 8)


@dataclass(frozen=True)
class Operation:
    """One line of the plan's program.

    Attributes:
        kind: "function" (a kernel of the compiler), "fully_connected", "corrltn" (a convolution),
            "runtime_fusion" (a product with what follows it), "copy", "signal" and others.
        inputs, outputs: tensors that are data, without the sizes that kernels take beside them.
        backbone: of a fusion, "gemm", "conv" or "deconv"; "" elsewhere.
        layers: of the network, as the builder names them.
    """

    kind: str
    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    stream: int
    backbone: str
    layers: tuple[str, ...]
    transposed: tuple[bool, bool]


@dataclass(frozen=True)
class EnginePlan:
    """What an engine does in one call.

    Attributes:
        targets: architectures that it was compiled for.
        capturable: whether CUDA can record it as a graph; None where the plan does not say.
        streams: how many run side by side, the caller's among them; None likewise.
        inputs, outputs: names of the tensors of its inputs and outputs, as the engine's caller
            knows them.
        tensors: every tensor by the plan's name.
        operations: of one call, in order.
        shapes: the program that computes the sizes: (operation, results, arguments).
    """

    targets: tuple[str, ...]
    capturable: bool | None
    streams: int | None
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    operations: tuple[Operation, ...]
    shapes: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]

    @cached_property
    def kernels(self) -> tuple[Operation, ...]:
        """The operations that do something to data."""
        return tuple(op for op in self.operations if op.kind not in _QUIET)

    def at(self, shapes: Mapping[str, Sequence[int]]) -> EnginePlan:
        """Return the same plan with numbers in its dimensions, as far as `shapes` decides them.

        Args:
            shapes: input or output -> its shape.
        """
        sizes = self._sizes(shapes)
        known = {name: _sized(tensor, sizes) for name, tensor in self.tensors.items()}
        operations = tuple(
            replace(
                op,
                inputs=tuple(known.get(t.name, t) for t in op.inputs),
                outputs=tuple(known.get(t.name, t) for t in op.outputs),
            )
            for op in self.operations
        )
        return replace(self, tensors=known, operations=operations)

    def _sizes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, shape in shapes.items():
            tensor = self.tensors.get(f"{name}.1") or self.tensors.get(name)
            if tensor is not None and len(tensor.dims) == len(shape):
                pairs = zip(tensor.dims, shape, strict=True)
                found.update({dim: size for dim, size in pairs if isinstance(dim, str)})
        for kind, results, arguments in self.shapes:  # a size is a copy of a number of the program
            if kind == "copy" and results[0] in found:
                found.setdefault(arguments[0], found[results[0]])
        for kind, results, arguments in self.shapes:
            if not results or results[0] in found:
                continue
            if kind == "memset" and (number := re.match(r"-?\d+", arguments[0])):
                found[results[0]] = int(number.group())
            elif kind in _ARITHMETIC and all(name in found for name in arguments):
                value = _ARITHMETIC[kind](*(found[name] for name in arguments))
                if value is not None:
                    found[results[0]] = value
        return found


_QUIET = frozenset({"signal", "wait", "shape_call", "label", "assert", "memset"})
_ARITHMETIC: dict[str, Callable[..., int | None]] = {
    "copy": lambda a: a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a // b if b else None,
    "min": min,
    "max": max,
    "eq": lambda a, b: int(a == b),
    "neq": lambda a, b: int(a != b),
    "lt": lambda a, b: int(a < b),
    "leq": lambda a, b: int(a <= b),
    "gt": lambda a, b: int(a > b),
    "geq": lambda a, b: int(a >= b),
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "select": lambda condition, a, b: a if condition else b,
}


def read(path: Path) -> EnginePlan | None:
    """Return the plan in an engine's file, or None where there is none that can be read."""
    if not path.stat().st_size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        return find(held)


def find(engine: bytes | bytearray | memoryview | mmap.mmap) -> EnginePlan | None:
    """Return the plan in an engine, or None where there is none that can be read.

    Beside the network's, the file holds short plans of the fusions that it compiles at run time.
    """
    texts = []
    for match in _START.finditer(engine):
        text = _TEXT.match(engine, match.start())
        if text is not None and b"\nmain {" in text.group():
            texts.append(text.group().decode("ascii", "replace"))
    if not texts:
        return None
    return _parse(max(texts, key=len))


def _parse(text: str) -> EnginePlan | None:
    sections = dict(_sections(text))
    if not {"header", "descriptors", "main"} <= sections.keys():
        return None
    header = sections["header"]
    constant = {
        _field(line, "name") or ""
        for line in header
        if line.startswith("region=") and "constant=true" in line
    }
    tensors = {}
    for line in sections["descriptors"]:
        if line.startswith(("tensor={", "sub_tensor={")) and (tensor := _tensor(line, constant)):
            tensors[tensor.name] = tensor
    for name, tensor in tensors.items():
        if tensor.base in tensors:
            tensors[name] = replace(tensor, constant=tensors[tensor.base].constant)
    operations = tuple(
        op for line in sections["main"] if (op := _operation(line, tensors)) is not None
    )
    said = {key: value for line in header for key, eq, value in [line.partition("=")] if eq}
    streams = next((v for k, v in said.items() if k.strip() == "n_streams"), "").strip()
    capturable = said.get("stream_capturable", "").strip()
    return EnginePlan(
        targets=tuple(said.get("accelerators", "").strip("{} ").split()),
        capturable={"1": True, "0": False}.get(capturable),
        streams=int(streams) if streams.isdigit() else None,
        inputs=_names(said.get("inputs", "")),
        outputs=_names(said.get("outputs", "")),
        tensors=tensors,
        operations=operations,
        shapes=tuple(_shape_program(sections.get("shape_main", []))),
    )


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    name = ""
    lines: list[str] = []
    for line in text.splitlines():
        if re.fullmatch(r"[a-z_]+ \{", line):
            name, lines = line[:-2], []
        elif line == "}" and name:
            yield name, lines
            name = ""
        else:
            lines.append(line.strip())


def _tensor(line: str, constant: set[str]) -> Tensor | None:
    name, kind = _field(line, "name"), _field(line, "type")
    if name is None or kind is None:
        return None
    dims = tuple(
        int(number) if number.isdigit() else quoted or number
        for quoted, number in _LIST.findall(_group(line, "dims") or "")
    )
    held = "const_payload_size=" in line or _field(line, "region") in constant
    return Tensor(name, kind, dims, _field(line, "base") or "", held)


def _operation(line: str, tensors: Mapping[str, Tensor]) -> Operation | None:
    match = re.match(r"([a-z_0-9]+)=\{", line)
    name = _field(line, "name")
    if match is None or name is None:
        return None
    inputs = _group(line, "input_args") or _group(line, "input") or ""
    outputs = _group(line, "output_args") or _group(line, "output") or ""
    return Operation(
        kind=match.group(1),
        name=name,
        inputs=tuple(_data(inputs, tensors)),
        outputs=tuple(_data(outputs, tensors)),
        stream=int(_field(line, "stream") or 0),
        backbone=_field(line, "backbone") or "",
        layers=tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", line)),
        transposed=(_field(line, "trA") == "true", _field(line, "trB") == "true"),
    )


def _data(names: str, tensors: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield the tensors that are data: the number of a size is one of type int64 called a proxy."""
    for name in re.findall(r'"([^"]*)"', names):
        if "proxy" not in name and name in tensors:
            yield tensors[name]


def _shape_program(lines: list[str]) -> Iterator[tuple[str, tuple[str, ...], tuple[str, ...]]]:
    for line in lines:
        if match := re.match(r"([a-z_0-9]+)=\{", line):
            results = tuple(re.findall(r'"([^"]*)"', _group(line, "output") or ""))
            source = _field(line, "src")
            arguments = tuple(re.findall(r'"([^"]*)"', _group(line, "input") or ""))
            yield match.group(1), results, (source,) if source is not None else arguments


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.removesuffix(".1") for name in re.findall(r'"([^"]*)"', listed))


def _field(line: str, key: str) -> str | None:
    found = re.search(rf'(?<![\w.]){key} ?= ?(?:"([^"]*)"|([^\s{{}}"]+))', line)
    return None if found is None else found.group(1) if found.group(2) is None else found.group(2)


def _group(line: str, key: str) -> str | None:
    found = re.search(rf'(?<![\w.]){key}=\{{((?:"[^"]*"|[^"}}])*)\}}', line)
    return None if found is None else found.group(1)


def _sized(tensor: Tensor, sizes: Mapping[str, int]) -> Tensor:
    dims = tuple(sizes.get(d, d) if isinstance(d, str) else d for d in tensor.dims)
    return replace(tensor, dims=dims)
