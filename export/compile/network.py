"""What a parsed network computes in and holds: read back, layer by layer, not asserted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from bifrost_rt.manifest import INDICES
from export.formats import FORMATS

_NAMES = {f.tensorrt: f.runtime.computes_in or f.dtype for f in FORMATS.values()}
_BITS = {f.tensorrt: f.code_bits for f in FORMATS.values()}
_PRODUCTS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "ATTENTION_INPUT")
_ATTENTION = "_AttentionInput"  # the parser makes two layers of one attention


@dataclass(frozen=True)
class Arithmetic:
    """Of one network.

    Attributes:
        products: dtype -> how many matrix products, convolutions and attentions compute in it.
        weights: dtype -> bytes of constants, and of inputs that are weights.
        layers: each of those products, by its layer's name -> dtype.
        heads: attention, by its layer's name -> how wide a head is.
    """

    products: dict[str, int]
    weights: dict[str, int]
    layers: dict[str, str] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)

    @property
    def compute(self) -> str:
        """The dtype of most products."""
        return max(self.products, key=lambda dtype: self.products[dtype])

    @property
    def stored(self) -> str:
        """The dtype of most bytes, those apart in which no layer computes."""
        return max(self.weights, key=lambda dtype: (dtype not in INDICES, self.weights[dtype]))


def read(trt: Any, network: Any, weights: Collection[str] = ()) -> Arithmetic:
    """Read a network.

    Args:
        weights: the inputs that are weights.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    made_by = {
        layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)
    }
    # a constant behind a Cast is held as what it is cast to
    unpacked = {
        layer.get_input(0).name: layer.get_output(0)
        for layer in layers
        if layer.type.name == "CAST"
    }
    computes: dict[str, str] = {}
    heads: dict[str, int] = {}
    products: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for layer in layers:
        kind = layer.type.name
        if kind in _PRODUCTS:
            dtype = _computes_in(layer, made_by)
            products[dtype] += 1
            computes[layer.name.removesuffix(_ATTENTION)] = dtype
        if kind == "ATTENTION_INPUT":
            heads[layer.name.removesuffix(_ATTENTION)] = layer.get_input(0).shape[-1]
        if kind == "CONSTANT":
            tensor = unpacked.get(layer.get_output(0).name, layer.get_output(0))
            held[name(tensor.dtype)] += _bits(tensor) // 8
        elif kind in ("CONVOLUTION", "DECONVOLUTION"):
            layer.__class__ = getattr(trt, f"I{kind.capitalize()}Layer")  # a derived type
            held[name(layer.get_input(0).dtype)] += layer.kernel.nbytes
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        if tensor.name in weights:
            held[name(tensor.dtype)] += _bits(tensor) // 8
    stored = {dtype: size for dtype, size in held.items() if size}
    return Arithmetic(dict(products), stored, computes, heads)


def name(dtype: Any) -> str:
    """Return a library's dtype as the manifest calls it."""
    return _NAMES.get(dtype.name, dtype.name.lower())


def _computes_in(layer: Any, made_by: dict[str, Any]) -> str:
    """Return the type of what it multiplies. Two dequantized inputs are multiplied as they were
    before: that is what the builder makes of them."""
    inputs = [layer.get_input(i) for i in range(min(2, layer.num_inputs))]
    makers = [_maker(tensor, made_by) for tensor in inputs]
    if len(makers) == 2 and all(m is not None and m.type.name == "DEQUANTIZE" for m in makers):
        return name(makers[0].get_input(0).dtype)
    return name(inputs[0].dtype)


def _maker(tensor: Any, made_by: dict[str, Any]) -> Any:
    """Return the layer that a tensor comes from, through changes of its shape alone."""
    layer = made_by.get(tensor.name)
    while layer is not None and layer.type.name == "SHUFFLE":
        layer = made_by.get(layer.get_input(0).name)
    return layer


def _bits(tensor: Any) -> int:
    bits = _BITS.get(tensor.dtype.name, 8 * tensor.dtype.itemsize)
    for size in tensor.shape:
        bits *= size
    return bits
