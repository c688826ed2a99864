"""Weights that an engine gets at run time, by address, instead of holding them.

The large constants of a graph become inputs. The engine is then a few megabytes and is compiled in
seconds and little memory, whatever the model's size; the weights lie beside it in a plain file, one
after another, as they are computed with.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import onnx_ir as ir

from bifrost_rt.manifest import BoundWeight

# each writes itself to a file
Tensor: TypeAlias = ir.ExternalTensor | ir.LazyTensor | ir.Tensor[Any]
SMALLEST = 1 << 16  # bytes; what is smaller is held by the engine
ALIGNMENT = 256  # of device memory: the file can be uploaded in one piece
_FEW_BITS = 4  # or fewer
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")


def bind(model: ir.Model) -> list[Tensor]:
    """Turn the large constants into inputs of the same names, in place, and return them. Those of 4
    bits and their scales stay constants. A weight that is only read behind a Cast is cast here,
    once, and not at every step."""
    graph = model.graph
    _cast_now(graph)
    stays = _of_four_bits(graph)
    taken: list[Tensor] = []
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None, name
        if tensor.nbytes >= SMALLEST and value not in stays:
            tensor.name = name
            taken.append(cast(Tensor, tensor))
            del graph.initializers[name]
            value.const_value = None
            value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
            graph.inputs.append(value)
    return taken


def _cast_now(graph: ir.Graph) -> None:
    """Put what casts make of large weights in their place, where nothing else reads them. What no
    product reads stays as it is: an elementwise kernel reads half as much and casts for nothing."""
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None, name
        if tensor.nbytes < SMALLEST:
            continue
        while (dtype := _only_cast(value)) is not None:  # a conversion casts what was cast
            new = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
            read = functools.partial(_cast, tensor, dtype, name)
            tensor = ir.LazyTensor(read, dtype, ir.Shape(tensor.shape.numpy()), name=name)
            new.const_value = tensor
            users = list(value.consumers())
            del graph.initializers[name]
            graph.register_initializer(new)
            for user in users:
                user.outputs[0].replace_all_uses_with(new, replace_graph_outputs=True)
                graph.remove(user, safe=True)
            value = new


def _only_cast(value: ir.Value) -> ir.DataType | None:
    """Return the type that all users of a weight cast it to; None where one does something else, or
    no product reads it."""
    users = list(value.consumers())
    types = {user.attributes["to"].as_int() for user in users if user.op_type == "Cast"}
    alone = len(types) == 1 and all(user.op_type == "Cast" for user in users)
    return ir.DataType(types.pop()) if alone and _multiplied(value) else None


def _multiplied(value: ir.Value) -> bool:
    """Say whether products read a value, maybe behind casts."""
    users = list(value.consumers())
    cast = (user.outputs[0] for user in users if user.op_type == "Cast")
    return any(user.op_type in _PRODUCTS for user in users) or any(map(_multiplied, cast))


def _cast(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> ir.Tensor[Any]:
    return ir.Tensor(tensor.numpy().astype(dtype.numpy()), dtype=dtype, name=name)


def _of_four_bits(graph: ir.Graph) -> set[ir.Value]:
    """Weights of 4 bits and what they are dequantized with."""
    found: set[ir.Value] = set()
    for node in graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            dtype = node.inputs[0].dtype
            if dtype is None or 8 * dtype.itemsize > _FEW_BITS:
                continue
            for value in node.inputs:
                while value is not None:  # the scale of nvfp4 is dequantized itself
                    found.add(value)
                    maker = value.producer()
                    value = None if maker is None else maker.inputs[0]
    return found


def store(
    tensors: Sequence[Tensor], path: Path, known: dict[str, BoundWeight] | None = None
) -> tuple[BoundWeight, ...]:
    """Write weights to a file, one at a time; no file where others hold all of them.

    Args:
        known: digest of a tensor -> where an engine before has it; what is written is added. None:
            the engines share nothing.
    """
    found = []
    with path.open("wb") as stream:
        for tensor in tensors:
            digest = "" if known is None else _digest(tensor)
            name, shape = str(tensor.name), tuple(tensor.shape.numpy())
            if known is not None and digest in known:
                found.append(dataclasses.replace(known[digest], name=name, shape=shape))
                continue
            stream.write(bytes(-stream.tell() % ALIGNMENT))
            offset = stream.tell()
            tensor.tofile(stream)
            dtype = tensor.dtype.numpy().name
            found.append(BoundWeight(name, dtype, shape, path.name, offset, tensor.nbytes))
            if known is not None:
                known[digest] = found[-1]
    if not path.stat().st_size:
        path.unlink()
    return tuple(found)


def _digest(tensor: Tensor) -> str:
    return f"{tensor.dtype.name} {hashlib.sha256(tensor.tobytes()).hexdigest()}"
