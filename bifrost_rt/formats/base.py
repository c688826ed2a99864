"""What running a set asks of a number format. `export.formats` has what building one asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bifrost_rt.manifest import Deviation


@dataclass(frozen=True)
class Format:
    """A number format, as far as a runtime needs to know it.

    Attributes:
        name: as recipes and `Precision.layers` call it.
        dtype: of a stored weight, as `Precision.weights` calls it.
        weight_bits: per weight, scales of blocks included; scales of channels are not.
        order: its place in every list.
        computes_in: the dtype of its products where a library has them, as `Precision.compute`
            calls it; None where only weights are stored so.
        quantized: whether weights and activations need scales.
        largest: its largest number, where that is far below float32's.
        deviation: what products in it may do to the self-test's image; None with `computes_in`.
        kernels: of a quantized format, the operators that onnxruntime's CPU provider computes its
            layers with; none where it simulates them.
        multiplies_bytes: whether a CPU multiplies 8-bit integers, which is exact on some alone.
        session_entries: of onnxruntime, for engines that have such layers.
        disabled_optimizers: of onnxruntime, likewise.
        in_memory: backend -> bytes in memory over bytes stored, where most weights are stored so.
        precise_in_memory: the same for onnxruntime's precise mode.
        compared: whether onnxruntime and OpenVINO were compared with it, see `backends/choice.py`.
    """

    name: str
    dtype: str
    weight_bits: float
    order: int
    computes_in: str | None = None
    quantized: bool = False
    largest: float | None = None
    deviation: Deviation | None = None
    kernels: tuple[str, ...] = ()
    multiplies_bytes: bool = False
    session_entries: Mapping[str, str] = field(default_factory=dict)
    disabled_optimizers: tuple[str, ...] = ()
    in_memory: Mapping[str, float] = field(default_factory=dict)
    precise_in_memory: float | None = None
    compared: bool = False

    @property
    def rounds_activations(self) -> bool:
        """Whether its layers round their inputs, so that a small difference moves by steps."""
        return self.quantized and self.computes_in is not None

    @property
    def simulated(self) -> bool:
        """Whether a CPU computes in float32 with values that are rounded as the format does."""
        return self.quantized and not self.kernels
