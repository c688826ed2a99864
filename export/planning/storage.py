"""How many bytes a weight takes, precision by precision."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Storage:
    """A precision of stored weights, and what the device computes in.

    Attributes:
        linear_bits: per weight of a linear layer, scales of blocks included.
        other_bytes: per weight of an embedding or a convolution.
        channel_bytes: per output channel of a linear layer, for its scale.
        dtype: of most of the bytes, as a manifest calls it.
        compute: which of a device's peak rates applies to linear layers.
    """

    name: str
    linear_bits: float
    other_bytes: int
    channel_bytes: int
    dtype: str
    compute: str

    @property
    def kept_bits(self) -> float:
        """Per weight of a linear layer that a quantised set keeps in 16 bit."""
        return max(16, self.linear_bits)

    @property
    def activation_scale(self) -> float:
        """Of activations and scratch memory, over float32."""
        return 1.0 if self.name == "fp32" else 0.5


STORAGES = {
    storage.name: storage
    for storage in (
        Storage("fp32", 32, 4, 0, "float32", "fp32"),
        Storage("bf16", 16, 2, 0, "bfloat16", "fp16"),
        Storage("fp16", 16, 2, 0, "float16", "fp16"),
        Storage("fp8", 8, 2, 4, "float8_e4m3fn", "fp8"),
        Storage("int8", 8, 2, 4, "int8", "int8"),
        Storage("nvfp4", 4.5, 2, 0, "uint4", "fp4"),
        Storage("int4", 4.5, 2, 0, "int4", "fp16"),
    )
}


@dataclass(frozen=True)
class Elements:
    """The numbers that an engine stores.

    Attributes:
        linear: weights of linear layers.
        excepted: of further ones, which stay in 16 bit where others are quantised.
        channels: output channels of `linear`.
        other: weights of embeddings and convolutions.
        kept: bytes of what stays in float32 at every precision: norms, biases, tables, and whatever
            is too small to be worth a conversion.
    """

    linear: int
    excepted: int
    channels: int
    other: int
    kept: int

    def bytes_at(self, storage: Storage | None) -> int:
        """Bytes of all of them; None is float32."""
        s = storage or STORAGES["fp32"]
        scales = self.channels * s.channel_bytes
        return (
            round(self.linear * s.linear_bits / 8)
            + round(self.excepted * s.kept_bits / 8)
            + self.other * s.other_bytes
            + scales
            + self.kept
        )
