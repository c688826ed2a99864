"""What building, planning and compiling ask of a number format, beside what running asks."""

from __future__ import annotations

from dataclasses import dataclass

from bifrost_rt import formats
from bifrost_rt.formats.base import Format as Runtime


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format. Nothing that has to be installed is needed to know one.

    Attributes:
        runtime: what a runtime knows of it.
        other_bytes: per weight of an embedding or a convolution, where a set is stored in it.
        channel_bytes: per output channel of a linear layer, for its scale.
        rate: which of a device's peak rates applies to linear layers (`planning.devices`).
        since: the least compute capability, times ten, of NVIDIA GPUs that compute in it.
        tensorrt: its type in TensorRT's words.
        plan: its types in the words of a TensorRT-RTX engine's plan.
        stored: ONNX's type of a weight in graphs for a CPU, in small letters.
        inputs: of a layer, the types that they go through there, or the function of the model that
            rounds them; "" where they stay as they are.
        weight_function: of the model, that unpacks a weight; None where ONNX's own operator does.
        safetensors: its type in checkpoints; None where no checkpoint has it.
        rounding: relative error in the mean that one layer may add; None where inputs stay as they
            are.
        bare_sums: builders that store the sums of its products before the scales are applied.
    """

    runtime: Runtime
    other_bytes: int
    channel_bytes: int = 0
    rate: str
    since: int
    tensorrt: str
    plan: tuple[str, ...] = ()
    stored: str
    inputs: tuple[str, ...] = ("",)
    weight_function: str | None = None
    safetensors: str | None = None
    rounding: float | None = None
    bare_sums: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As recipes call it."""
        return self.runtime.name

    @property
    def dtype(self) -> str:
        """Of most of the bytes, as a manifest calls it."""
        return self.runtime.dtype

    @property
    def quantized(self) -> bool:
        """Whether weights and activations need scales."""
        return self.runtime.quantized

    @property
    def linear_bits(self) -> float:
        """Per weight of a linear layer, scales of blocks included."""
        return self.runtime.weight_bits

    @property
    def code_bits(self) -> int:
        """Of one number."""
        return int(self.runtime.weight_bits)

    @property
    def activation_scale(self) -> float:
        """Of activations and scratch memory, over float32."""
        return 1.0 if self.runtime is formats.FULL else 0.5
