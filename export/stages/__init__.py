"""One file per engine: the module that becomes the graph, its tensors, its tolerance."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from bifrost_rt.manifest import TensorSpec


@dataclass(frozen=True)
class Stage:
    """One engine before it is a graph.

    Attributes:
        module: called with the inputs in order, returns the outputs in order.
        carry: output -> the input that it becomes in the loop's next step.
        tolerance: largest absolute difference to torch in float32, on real inputs.
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    tolerance: float
    carry: dict[str, str] = field(default_factory=dict)
