"""A graph's weights, without their values: read when the graph is written, one by one."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

from export import lazy_tensors
from export.lazy_tensors import LazyTensor

TRANSPOSED = ".transposed"  # behind the name of a parameter that is stored both ways


class Place(NamedTuple):
    """Where a tensor's bytes are: `length` of them, from `offset` in a file of the set."""

    file: str
    offset: int
    length: int


class Weight(ir.LazyTensor):
    """An initializer that is read when it is written.

    Attributes:
        source: its values, in the type in which they exist; the initializer's own may be wider.
    """

    __slots__ = ("source",)

    def __init__(self, source: LazyTensor, dtype: ir.DataType, name: str) -> None:
        wanted = source.cast(to_torch_dtype(dtype))

        def read() -> TorchTensor:
            lazy_tensors.give_back(source.nbytes)  # the tensor that was written before this one
            return TorchTensor(wanted.read().contiguous(), name)

        super().__init__(read, dtype, ir.Shape(source.shape), name=name)
        self.source = source
