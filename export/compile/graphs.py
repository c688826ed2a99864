"""A set's ONNX graph, read for a builder and handed to its parser.

The graph is changed in memory (types, weights as inputs), so the parser gets it as bytes, and the
large constants by address: those that stay as they are stored are pages of the set's own file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from export.errors import CompileError

INLINE = 1024  # bytes; what is smaller travels inside the graph
REBUILD = "rebuild the set with `python -m export.build`"


def read(path: Path, stage: str) -> ir.Model:
    """Return a graph of a set; its weights stay in their file.

    Raises:
        CompileError: the file is not an ONNX graph, or its weights lie outside of the set or beyond
            the end of their file.
    """
    try:
        model = ir.load(path)
    except (OSError, DecodeError, ValueError, ir.serde.SerdeError) as error:
        raise CompileError(
            f"engine `{stage}`: {path.name} is not an ONNX graph: {error}", hint=REBUILD
        ) from None
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _in_the_set(value.const_value, path.parent, stage)
    return model


def _in_the_set(tensor: ir.ExternalTensor, folder: Path, stage: str) -> ir.ExternalTensor:
    """Return the tensor by its whole path. Files of a set may be links, hard or symbolic, which the
    library refuses to read by a path within a folder; what they hold was checked by their hash.
    What the graph names must be a file of the set."""
    if Path(tensor.location).name != str(tensor.location):
        raise CompileError(
            f"engine `{stage}`: the weight {tensor.name} lies outside of the set, in "
            f"{folder / tensor.location}",
            hint=REBUILD,
        )
    file = (folder / tensor.location).resolve()
    end, size = (tensor.offset or 0) + tensor.nbytes, file.stat().st_size if file.is_file() else 0
    if end > size:
        raise CompileError(
            f"engine `{stage}`: the weight {tensor.name} ends at byte {end} of {file.name}, which "
            f"has {size}",
            hint=REBUILD,
        )
    return ir.ExternalTensor(
        str(file),
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=str(tensor.name),
    )


def feed(parser: Any, model: ir.Model) -> list[NDArray[Any]] | None:
    """Parse a graph.

    Returns:
        The constants that the network now points at, to be kept until the engine is built; None
        where the parser has errors to tell.
    """
    held: dict[str, NDArray[Any]] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None, name
        if tensor.nbytes > INLINE:
            held[name] = _bytes(tensor)
            value.const_value = ir.ExternalTensor(
                "weights",
                0,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=name,
            )
        elif isinstance(tensor, ir.ExternalTensor | ir.LazyTensor):  # its errors are raised here
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
    if not parser.load_model_proto(ir.to_proto(model).SerializeToString()):
        return None
    for name, array in held.items():
        if not parser.load_initializer(name, array.ctypes.data, array.nbytes):
            return None
    return list(held.values()) if parser.parse_model_proto() else None


def weight_bytes(model: ir.Model) -> int:
    """Of all constants, as a builder holds them: what is cast to float32, in float32."""
    found = 0
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        cast = any(node.op_type == "Cast" for node in value.consumers())
        found += max(tensor.nbytes, 4 * tensor.size if cast else 0)
    return found


def _bytes(tensor: ir.TensorProtocol) -> NDArray[Any]:
    if tensor.dtype.itemsize < 1:  # two numbers to a byte, which numpy would take apart
        return np.frombuffer(tensor.tobytes(), np.uint8)
    return np.ascontiguousarray(tensor.numpy())
